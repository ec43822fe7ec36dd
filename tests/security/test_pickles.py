"""Pickles that ask for more than their files have are refused in little memory and time."""

from __future__ import annotations

import pickle
import struct
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
from limits import linux, refused
from tiny import tiny_dit
from torch import Tensor

from dit_engine.checkpoint import load_checkpoint

pytestmark = linux
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return tiny_dit(hidden_size=128).state_dict()


# What pickles are made of: the instructions of protocol 2.


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def python(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def whole(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def number(count: int) -> bytes:
    """The instruction to take from, or put into, a place of the memo."""
    return struct.pack("<I", count)


def doubled(value: bytes) -> bytes:
    """A tuple of a tuple twice, of a tuple twice, …: 2**60 of ``value``."""
    levels = (b"r" + number(i) + b"j" + number(i) + b"\x86" for i in range(60))
    return value + b"".join(levels)


def hexadecimal() -> bytes:
    made = python("_codecs", "encode") + text("a" * 100) + text("latin1") + b"\x86R"
    for _ in range(30):
        made = python("_codecs", "encode") + made + text("hex") + b"\x86R"
    return made


def called(module: str, name: str, *arguments: bytes) -> bytes:
    return python(module, name) + b"(" + b"".join(arguments) + b"tR"


def copied(module: str, name: str, value: bytes) -> bytes:
    """A list of 20,000 copies of ``value``."""
    copies = 20_000 * (b"h\x02h\x01\x85R")
    return b"](" + value + b"q\x01" + python(module, name) + b"q\x02" + copies + b"e"


NUMBERS = b"(" + b"K\x01" * 50_000 + b"t"
LIST = b"](" + b"K\x01" * 50_000 + b"e"
STORAGE = b"(" + text("storage") + python("torch", "FloatStorage") + text("0") + text("cpu")
_OLD = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
BEGINNING = b"".join(pickle.dumps(part, protocol=2) for part in _OLD)  # before torch 1.6
KEY = "a large tuple as a key"
PICKLES: dict[str, tuple[bytes, str]] = {
    "a text, encoded again and again": (hexadecimal(), "_codecs.encode"),
    "bytes by number": (called("builtins", "bytearray", whole(5 * 10**9)), "builtins.bytearray"),
    "a tensor by number": (called("torch", "FloatTensor", whole(10**9)), "'torch.FloatTensor'"),
    "a quantised tensor": (called("torch._utils", "_rebuild_qtensor", b"N"), "_rebuild_qtensor"),
    "by way of a type": (
        called("torch._tensor", "_rebuild_from_type_v2", python("builtins", "bytearray"),
               python("torch", "Tensor"), whole(10**10) + b"\x85", b"}"), "builtins.bytearray"),
    "copies of a tuple": (copied("torch", "Size", NUMBERS), "copies more than it holds"),
    "copies of a set": (copied("builtins", "set", LIST), "copies more than it holds"),
    "one list many times in a call": (
        called("torch", "device", LIST + b"q\x01", 50_000 * b"h\x01"), "copies more than it holds"),
    "copies of a text": (copied("torch", "device", text("c" * 99999)), "copies more than it hol"),
    "attributes of objects": (
        b"](" + LIST + b"q\x01" + python("collections", "OrderedDict") + b"q\x02"
        + 20_000 * b"h\x02)Rh\x01b" + b"e", "copies more than it holds"),
    "a text by its length": (b"X" + number(2**32 - 1), "damaged or not a PyTorch file"),
    "lists": (b"](" + b"]" * 2_000_000 + b"e", "makes more than 300000 objects"),
    "a key that is never hashed": (b"}" + doubled(b"N") + b"Ns", KEY),
    "a member that is never hashed": (called("builtins", "set", b"](" + doubled(b"N") + b"e"), KEY),
    "a pair that is never hashed": (
        called("collections", "OrderedDict", b"](](" + doubled(b"N") + b"Nee"), KEY),
    "a long key, again and again": (b"}" + NUMBERS + b"q\x01N" + b"s" + 20_000 * b"h\x01Ns", KEY),
    "attributes in pairs": (
        python("collections", "OrderedDict") + b")R](](" + doubled(b"N") + b"Neeb", KEY),
    "keys of one hash": (
        b"}(" + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N"
                        for i in range(1, 20_000)) + b"u", "whole number of more than 60 bits"),
    "fractions as keys": (
        b"}(" + b"".join(b"G" + struct.pack(">d", i) + b"N" for i in range(10_001)) + b"u",
        "more than 10000 keys that are slow to hash"),
    "a storage by a long name": (
        b"(" + text("storage") + python("torch", "FloatStorage") + doubled(b"N") + text("cpu")
        + b"K\x01tQ", "a storage without a name"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["zip", "before torch 1.6"])
def test_all_that_a_training_may_save_is_still_read(
    form: str, state: State, tmp_path: Path
) -> None:
    parameter, tensor = torch.nn.Parameter(torch.ones(3)), torch.ones(4)
    parameter.note = tensor.note = "kept"
    shared = [0.9, 0.999]
    everything = {
        "model": OrderedDict(state), "args": Namespace(lr=1e-4),
        "optimizer": torch.optim.AdamW([parameter]).state_dict(),
        "losses": [0.1 * i for i in range(100_000)], "milestones": Counter({10: 1, 20: 2}),
        "bytes": bytes(range(256)) * 40, "bytearray": bytearray(b"abc" * 1000),
        "set": {1, "a", 2.5}, "empty": bytearray(), "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16, "device": torch.device("cpu"), "parameter": parameter,
        "sizes": {(256, 256): 1, ((1, 2), 0.5): 2}, "complex": 1 + 2j, "big": 2**200, "none": None,
        "tensor": tensor, "rng": torch.get_rng_state(), "bools": torch.ones(5, dtype=torch.bool),
        "view": torch.arange(100).view(10, 10).t()[2:5], "nested": [[[[(1, (2, (3,)))]]]],
        "betas": [shared, shared], "text": "ä" * 5000, "scalar": torch.tensor(3.0),
    }  # fmt: skip
    path = tmp_path / "m.pt"
    torch.save(everything, path, _use_new_zipfile_serialization=form == "zip")
    loaded = load_checkpoint(path, num_heads=2)
    assert loaded.config.depth == 2 and set(loaded.state_dict) == set(state)


def write_archive(path: Path, data: bytes, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", bytes(64))
        archive.writestr("archive/version", "3\n")
    return path


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_makes_nothing_larger_than_itself(case: str, tmp_path: Path) -> None:
    value, message = PICKLES[case]
    data, path = b"\x80\x02}" + text("x") + value + b"s.", tmp_path / "m.pt"
    refused(lambda: load_checkpoint(write_archive(path, data)), message)
    assert path.stat().st_size < 6_000_000
    if case != "lists":  # which takes seconds
        path.write_bytes(BEGINNING + data)  # as before torch 1.6
        refused(lambda: load_checkpoint(path), message)


def test_compressed_archives(tmp_path: Path) -> None:
    data = b"\x80\x02}" + text("x") + b"](" + b"]" * 40_000_000 + b"es."
    path = write_archive(tmp_path / "m.pt", data, zipfile.ZIP_DEFLATED)
    refused(lambda: load_checkpoint(path), "is compressed")
    refused(lambda: load_checkpoint("builtin", vae=path), "is compressed")


def test_members_of_one_name(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "m.pt", b"\x80\x02}.")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("ARCHIVE/DATA.PKL", b"\x80\x02}" + text("x") + hexadecimal() + b"s.")
    refused(lambda: load_checkpoint(path), "holds 'archive/data.pkl' twice")


def test_tensors_larger_than_the_file(tmp_path: Path) -> None:
    """Before torch 1.6 the pickle alone says how large a storage is, which torch then allocates."""
    value = STORAGE + whole(10**9) + b"NtQ"
    (tmp_path / "m.pt").write_bytes(BEGINNING + b"\x80\x02}" + text("x") + value + b"s.")
    refused(lambda: load_checkpoint(tmp_path / "m.pt"), "its tensors take 4000000000 bytes")


def test_an_archive_of_two_directories(tmp_path: Path) -> None:
    """torch reads the one where the last record says, and Python the one before the record."""
    path = tmp_path / "m.pt"
    data = write_archive(path, b"\x80\x02}.").read_bytes()
    (offset,) = struct.unpack("<I", data[-6:-2])
    path.write_bytes(data[:-22] + data[offset:])
    refused(lambda: load_checkpoint(path), "a directory at another place than it says")
    path.write_bytes(data[:-2] + b"\1\0 ")  # a comment, in which another record could be
    refused(lambda: load_checkpoint(path), "does not end with its directory")


def test_a_long_log_still_loads(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dit_engine.checkpoint.pickles.MOST_OBJECTS", 3000)
    log = [{"step": i, "loss": float(i)} for i in range(10_000)]
    torch.save({"model": state, "log": log}, tmp_path / "m.pt")
    assert load_checkpoint(tmp_path / "m.pt", num_heads=2).config.depth == 2
