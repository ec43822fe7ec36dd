"""A file of another kind than its name says is named as what it is, by every reader."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from tiny import NAMES, tiny_dit, tiny_vae

from dit_engine.checkpoint import load_checkpoint, save_pretrained
from dit_engine.cli.tensors import read_tensor
from dit_engine.io.formats import format_of
from dit_engine.io.images import read_rgb

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2700000000\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
STATE = {"w": torch.ones(2)}


def written(write: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def archive(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(name, content)
    return buffer.getvalue()


TORCH = written(lambda b: torch.save(STATE, b))
LEGACY = written(lambda b: torch.save(STATE, b, _use_new_zipfile_serialization=False))
# A header of 640 bytes: its length begins like a pickle of protocol 2.
LONG = save(STATE, {"k": "x" * (640 - int.from_bytes(save(STATE, {"k": ""})[:8], "little"))})
KINDS: dict[str, tuple[bytes, str]] = {
    "pointer": (POINTER, "a Git LFS pointer"),
    "annex": (b"/annex/objects/SHA256E-s5--aa.pt\n", "a git-annex pointer"),
    "page": (PAGE, "a web page"),
    "page with a mark": (b"\xef\xbb\xbf<HTML lang='en'>" + b" " * 99, "a web page"),
    "commented page": (b"<!-- hello -->\n<html>", "a web page"),
    "xhtml": (b'<?xml version="1.0"?>\n<!DOCTYPE html><html>', "a web page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "an XML document"),
    "gzip": (gzip.compress(b"x" * 99), "a gzip archive"),
    "tar": (tarfile.TarInfo("model.pt").tobuf() + bytes(1024), "a tar archive"),
    "npz": (archive("arr_0.npy", b""), "a NumPy archive (.npz)"),
    "npy": (written(lambda b: np.save(b, np.ones(3))), "a NumPy array (.npy)"),
    "scripted": (archive("m/constants.pkl", b""), "a TorchScript archive"),
    "json": (b'{"error": "Repository not found"}', "a JSON file"),
    "safetensors": (save(STATE), "a safetensors file"),
    "pytorch": (TORCH, "a PyTorch file"),
    "legacy pytorch": (LEGACY, "a PyTorch file"),
    "pickle": (pickle.dumps(STATE, protocol=4), "a PyTorch file"),
    "long header": (LONG, "a safetensors file"),
}


def test_kinds_of_files(tmp_path: Path) -> None:
    assert LONG[:8] == b"\x80\x02" + bytes(6)
    for content, named in KINDS.values():
        (tmp_path / "x").write_bytes(content)
        assert format_of(tmp_path / "x") == named


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".index.json", ".npy", ".png"])
def test_every_reader_names_what_it_finds(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"download{suffix}"
    read: Callable[[Path], object] = {".npy": read_tensor, ".png": read_rgb}.get(
        suffix, load_checkpoint
    )
    for kind in ("pointer", "page"):
        content, named = KINDS[kind]
        path.write_bytes(content)
        said = rf"download{suffix}: {re.escape(named)}, not an? .*; "
        with pytest.raises(ValueError, match=said) as caught:
            read(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_every_file_of_a_directory(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "m", tiny_dit(), tiny_vae(), NAMES)
    parts = [path for path in (tmp_path / "m").rglob("*.*") if path.is_file()]
    assert len(parts) == 5
    for path in parts:
        before = path.read_bytes()
        path.write_bytes(POINTER)
        with pytest.raises(ValueError, match=f"{path.name}: a Git LFS pointer, not a "):
            load_checkpoint(tmp_path / "m")
        path.write_bytes(before)


def test_shards_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(save(STATE))
    (tmp_path / "b.safetensors").write_bytes(POINTER)
    index = {"weight_map": {"w": "a.safetensors", "x": "b.safetensors"}}
    for content, name, advice in (
        (json.dumps(index).encode(), "m.safetensors.index.json",
         r"b\.safetensors: a Git LFS pointer.*'git lfs pull'$"),
        (TORCH, "x.safetensors", "; rename it to end in .pt$"),
        (save(STATE), "x.pt", "; rename it to end in .safetensors$"),
        (gzip.compress(b""), "x.pt", "; unpack it first$"),
        (TORCH, "m.zip", r"suffix '\.zip' is not one of .*; it is a PyTorch file$"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=advice):
            load_checkpoint(tmp_path / name)
