"""A file of another kind than its name says is named as what it is, by every reader."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from dit_engine.checkpoint import load_checkpoint
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


TORCH = written(lambda b: torch.save(STATE, b))
# A header of 640 bytes: its length begins like a pickle of protocol 2.
LONG = save(STATE, {"k": "x" * (640 - int.from_bytes(save(STATE, {"k": ""})[:8], "little"))})
KINDS = {
    "a Git LFS pointer": [POINTER],
    "a git-annex pointer": [b"/annex/objects/SHA256E-s5--aa.pt\n"],
    "a web page": [PAGE, b"\xef\xbb\xbf<HTML lang='en'>", b"<!-- hello -->\n<html>",
                   b'<?xml version="1.0"?>\n<!DOCTYPE html><html>'],
    "an XML document": [b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>'],
    "a gzip archive": [gzip.compress(b"x" * 99)],
    "a tar archive": [tarfile.TarInfo("model.pt").tobuf() + bytes(1024)],
    "a NumPy array (.npy)": [written(lambda b: np.save(b, np.ones(3)))],
    "a NumPy archive (.npz)": [written(lambda b: np.savez(b, np.ones(3)))],
    "a JSON file": [b'{"error": "Repository not found"}'],
    "a safetensors file": [save(STATE), LONG],
    "a PyTorch file": [TORCH, pickle.dumps(STATE, protocol=4)],
}  # fmt: skip


def test_kinds_of_files(tmp_path: Path) -> None:
    assert LONG[:8] == b"\x80\x02" + bytes(6)
    for named, contents in KINDS.items():
        for content in contents:
            (tmp_path / "x").write_bytes(content)
            assert format_of(tmp_path / "x") == named


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".index.json", ".npy", ".png"])
def test_every_reader_names_what_it_finds(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"download{suffix}"
    readers: dict[str, Callable[[Path], object]] = {".npy": read_tensor, ".png": read_rgb}
    for content, named in ((POINTER, "a Git LFS pointer"), (PAGE, "a web page")):
        path.write_bytes(content)
        said = rf"download{re.escape(suffix)}: {named}, not an? .*; (fetch|the server)"
        with pytest.raises(ValueError, match=said) as caught:
            readers.get(suffix, load_checkpoint)(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_shards_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(save(STATE))
    (tmp_path / "b.safetensors").write_bytes(POINTER)
    index = {"weight_map": {"w": "a.safetensors", "x": "b.safetensors"}}
    for content, name, advice in (
        (json.dumps(index).encode(), "m.safetensors.index.json",
         r"b\.safetensors: a Git LFS pointer.*'git lfs pull'$"),
        (TORCH, "x.safetensors", "; rename it to end in .pt$"),
        (save(STATE), "x.pt", "; rename it to end in .safetensors$"),
        (TORCH, "m.zip", r"suffix '\.zip' is not one of .*; it is a PyTorch file$"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=advice):
            load_checkpoint(tmp_path / name)
