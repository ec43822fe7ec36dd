"""A file of another kind than its name says is named as what it is, by every reader."""

from __future__ import annotations

import gzip
import io
import json
import pickle
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

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 2700000000\n"
)
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
TAR = tarfile.TarInfo("model.pt").tobuf() + bytes(1024)
ARRAY = written(lambda b: np.save(b, np.ones(3)))
KINDS: dict[str, tuple[bytes, str]] = {
    "pointer": (POINTER, r"a Git LFS pointer \(to 2700000000 bytes\)"),
    "old pointer": (b"version https://hawser.github.com/spec/v1\n", "a Git LFS pointer"),
    "annex": (b"/annex/objects/SHA256E-s5--aa.pt\n", "a git-annex pointer"),
    "page": (PAGE, "a web page"),
    "page with a mark": (b"\xef\xbb\xbf<HTML lang='en'>" + b" " * 99, "a web page"),
    "commented page": (b"<!-- hello -->\n<html>", "a web page"),
    "xhtml": (b'<?xml version="1.0"?>\n<!DOCTYPE html><html>', "a web page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "an XML document"),
    "gzip": (gzip.compress(b"x" * 99), "a gzip archive"),
    "tar": (TAR, "a tar archive"),
    "npz": (archive("arr_0.npy", ARRAY), r"a NumPy archive \(\.npz\)"),
    "npy": (ARRAY, r"a NumPy array \(\.npy\)"),
    "scripted": (archive("m/constants.pkl", b""), "a TorchScript archive"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 99, "an HDF5 file"),
    "gguf": (b"GGUF\x03" + b"\0" * 99, "a GGUF file"),
    "png": (b"\x89PNG\r\n\x1a\n" + b"\0" * 99, "a PNG image"),
    "tensorflow": (b"\0" * 40 + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb", "a TensorFlow check"),
    "json": (b'{"error": "Repository not found"}', "a JSON file"),
    "safetensors": (save(STATE), "a safetensors file"),
    "pytorch": (TORCH, "a PyTorch file"),
    "legacy pytorch": (LEGACY, "a PyTorch file"),
    "pickle": (pickle.dumps(STATE, protocol=4), "a PyTorch file"),
}
WANTED = {".safetensors": "a safetensors file", ".json": "a JSON file"}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_kind(kind: str, tmp_path: Path) -> None:
    content, named = KINDS[kind]
    for suffix in (".pt", ".ckpt", ".safetensors", ".index.json"):
        path = tmp_path / f"download{suffix}"
        path.write_bytes(content)
        wanted = WANTED.get(path.suffix, "a PyTorch file")
        if named == wanted:
            assert format_of(path) == wanted
            continue
        said = rf"download{suffix}: {named}.*, not {wanted}"
        with pytest.raises(ValueError, match=said) as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_every_file_of_a_directory(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "m", tiny_dit(), tiny_vae(), NAMES)
    parts = [path for path in (tmp_path / "m").rglob("*.*") if path.is_file()]
    assert len(parts) == 5
    for path in parts:
        before = path.read_bytes()
        for content, named in ((POINTER, "a Git LFS pointer"), (PAGE, "a web page")):
            path.write_bytes(content)
            said = f"{path.name}: {named}.*, not a (JSON|safetensors) file; "
            with pytest.raises(ValueError, match=said):
                load_checkpoint(tmp_path / "m")
        path.write_bytes(before)


def test_shards_and_what_to_do(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "m", tiny_dit())
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "a.safetensors")
    (tmp_path / "m" / "b.safetensors").write_bytes(POINTER)
    index = {"weight_map": {"pos_embed": "a.safetensors", "x": "b.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"b\.safetensors: a Git LFS pointer .*'git lfs pull'$"):
        load_checkpoint(tmp_path / "m")
    for content, name, advice in (
        (TORCH, "x.safetensors", "; rename it to end in .pt$"),
        (save(STATE), "x.pt", "; rename it to end in .safetensors$"),
        (gzip.compress(b""), "x.pt", "; unpack it first$"),
        (TORCH, "m.zip", r"suffix '\.zip' is not one of .*; it is a PyTorch file$"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=advice):
            load_checkpoint(tmp_path / name)


def test_given_latents(tmp_path: Path) -> None:
    for kind in ("pointer", "page", "pytorch", "npz"):
        for suffix in (".npy", ".safetensors"):
            content, named = KINDS[kind]
            (tmp_path / f"z{suffix}").write_bytes(content)
            with pytest.raises(ValueError, match=f"z{suffix}: {named}.*, not a"):
                read_tensor(tmp_path / f"z{suffix}")
