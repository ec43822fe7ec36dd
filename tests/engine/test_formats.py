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


def saved(legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(STATE, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def archive(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(name, content)
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("model.pt"))
    return buffer.getvalue()


def array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    return buffer.getvalue()


KINDS: dict[str, tuple[Callable[[], bytes], str]] = {
    "pointer": (lambda: POINTER, r"a Git LFS pointer \(to 2700000000 bytes\)"),
    "old pointer": (lambda: b"version https://hawser.github.com/spec/v1\n", "a Git LFS pointer"),
    "annex": (lambda: b"/annex/objects/SHA256E-s5--aa.pt\n", "a git-annex pointer"),
    "page": (lambda: PAGE, "a web page"),
    "page with a mark": (lambda: b"\xef\xbb\xbf<HTML lang='en'>" + b" " * 99, "a web page"),
    "commented page": (lambda: b"<!-- hello -->\n<html>", "a web page"),
    "xhtml": (lambda: b'<?xml version="1.0"?>\n<!DOCTYPE html><html>', "a web page"),
    "xml": (lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "an XML document"),
    "gzip": (lambda: gzip.compress(b"x" * 99), "a gzip archive"),
    "tar": (tar, "a tar archive"),
    "npz": (lambda: archive("arr_0.npy", array()), r"a NumPy archive \(\.npz\)"),
    "npy": (array, r"a NumPy array \(\.npy\)"),
    "scripted": (lambda: archive("m/constants.pkl", b""), "a TorchScript archive"),
    "hdf5": (lambda: b"\x89HDF\r\n\x1a\n" + b"\0" * 99, "an HDF5 file"),
    "gguf": (lambda: b"GGUF\x03" + b"\0" * 99, "a GGUF file"),
    "png": (lambda: b"\x89PNG\r\n\x1a\n" + b"\0" * 99, "a PNG image"),
    "tensorflow": (lambda: b"\0" * 40 + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb", "a TensorFlow check"),
    "json": (lambda: b'{"error": "Repository not found"}', "a JSON file"),
    "safetensors": (lambda: save(STATE), "a safetensors file"),
    "pytorch": (lambda: saved(legacy=False), "a PyTorch file"),
    "legacy pytorch": (lambda: saved(legacy=True), "a PyTorch file"),
    "pickle": (lambda: pickle.dumps(STATE, protocol=4), "a PyTorch file"),
}
WANTED = {".safetensors": "a safetensors file", ".json": "a JSON file"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors", ".index.json"])
def test_weights_of_another_kind(kind: str, suffix: str, tmp_path: Path) -> None:
    content, named = KINDS[kind]
    path = tmp_path / f"download{suffix}"
    path.write_bytes(content())
    wanted = WANTED.get(path.suffix, "a PyTorch file")
    if named == wanted:
        assert format_of(path) == wanted
        return
    with pytest.raises(ValueError, match=rf"download{suffix}: {named}.*, not {wanted}") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("part", [
    "config.json", "labels.json", "model.safetensors", "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
])  # fmt: skip
@pytest.mark.parametrize(("content", "named"), [(POINTER, "a Git LFS pointer"),
                                                (PAGE, "a web page")])  # fmt: skip
def test_every_file_of_a_directory(part: str, content: bytes, named: str, tmp_path: Path) -> None:
    save_pretrained(tmp_path / "m", tiny_dit(), tiny_vae(), NAMES)
    (tmp_path / "m" / part).write_bytes(content)
    with pytest.raises(ValueError, match=f"{part}: {named}.*, not a (JSON|safetensors) file; "):
        load_checkpoint(tmp_path / "m")


def test_shards_and_what_to_do(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "m", tiny_dit())
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "a.safetensors")
    (tmp_path / "m" / "b.safetensors").write_bytes(POINTER)
    index = {"weight_map": {"pos_embed": "a.safetensors", "x": "b.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"b\.safetensors: a Git LFS pointer .*'git lfs pull'$"):
        load_checkpoint(tmp_path / "m")
    for content, name, advice in (
        (saved(legacy=False), "x.safetensors", "rename it to end in .pt$"),
        (save(STATE), "x.pt", "rename it to end in .safetensors$"),
        (gzip.compress(b""), "x.pt", "unpack it first$"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=advice):
            load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize("kind", ["pointer", "page", "pytorch", "npz"])
def test_given_latents(kind: str, suffix: str, tmp_path: Path) -> None:
    content, named = KINDS[kind]
    (tmp_path / f"z{suffix}").write_bytes(content())
    with pytest.raises(ValueError, match=f"z{suffix}: {named}.*, not a"):
        read_tensor(tmp_path / f"z{suffix}")


def test_an_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "m.zip").write_bytes(saved(legacy=False))
    with pytest.raises(ValueError, match=r"suffix '\.zip' is not one of .*; it is a PyTorch file$"):
        load_checkpoint(tmp_path / "m.zip")
