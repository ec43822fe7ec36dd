"""Arrays that claim far more data than their files hold, or are inflated from little data."""

from __future__ import annotations

import bz2
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from limits import linux, outcome
from safetensors.torch import save_file
from zeros import npy_header, raw_deflate, zipped

from dit_bench.quality.image_sets import open_set
from dit_engine.cli.tensors import read_tensor
from dit_engine.training.avatars import CLASSES, load_avatars
from dit_engine.training.vae_stage import read_latents

GB = 2**30


def member(name: str, shape: str, size: int, dtype: str = "'<f8'") -> list[tuple[str, bytes, int]]:
    """A member of an .npz: a header and ``size`` zeros."""
    header = npy_header(shape, dtype)
    return [(f"{name}.npy", raw_deflate(size, header), len(header) + size)]


def statistics() -> bytes:
    """A file of statistics with one large array."""
    others = [member(name, "(4,)", 32) for name in ("mu", "mu_s", "sigma_s")]
    return zipped(sum(others, member("sigma", "(16384, 16384)", 2 * GB)))


def squeezed() -> bytes:
    """A bzip2 archive: Python's reader unpacks a block of 4 KB at once, which here is gigabytes."""
    packing = bz2.BZ2Compressor()
    packed = packing.compress(npy_header("(60, 2048, 2048, 3)", "'|u1'"))
    zeros = bytes(2**24)
    packed += b"".join(packing.compress(zeros) for _ in range(4)) + packing.flush()
    return zipped([("arr_0.npy", packed, 60 * 2048 * 2048 * 3 + 200)], method=12)


U1 = "'|u1'"
SETS: dict[str, tuple[Callable[[], bytes], str]] = {
    "covariance": (statistics, r"sigma is float64 \(16384"),
    "one image": (lambda: zipped(member("arr_0", "(1, 26000, 26000, 3)", 2 * GB, U1)),
                  "arr_0 is of 26000×26000 pixels; 6[0-9]{7} in all are allowed in a file of"),
    "long": (lambda: zipped(member("arr_0", "(99999999999, 256, 256, 3)", 2**20, U1)),
             "cannot hold"),
    "claim": (lambda: zipped(member("arr_0", "(1024, 1024, 1024, 3)", 2**20, U1)), "ends early"),
    "lie": (lambda: zipped([("arr_0.npy", raw_deflate(99, npy_header("(9, 512, 512, 3)", U1)),
                            3 * GB)]), "more than its file can hold"),
    "bzip2": (squeezed, "compressed by method 12"),
    "twice": (lambda: zipped(member("arr_0", "(1, 2, 2, 3)", 12, U1) * 2), "occurs 2 times"),
    "encrypted": (lambda: zipped(member("arr_0", "(1, 2, 2, 3)", 12, U1), flags=1), "encrypted"),
}  # fmt: skip


def read_set(path: Path) -> None:
    for _ in open_set(path).batches(32):
        pass


@linux
@pytest.mark.parametrize("kind", SETS)
def test_a_small_npz_takes_little_memory(kind: str, tmp_path: Path) -> None:
    make, told = SETS[kind]
    path = tmp_path / "set.npz"
    path.write_bytes(make())
    assert path.stat().st_size < 2.5e6
    found = outcome(read_set, path, mib=200)
    assert found.startswith(f"ValueError: {path}") and re.search(told, found), found
    assert "\n" not in found and len(found) < 4000


@linux
def test_large_images_come_one_by_one(tmp_path: Path) -> None:
    """A batch of 32 would take 3 GB, from a file of 4 MB; one image has 93 MiB."""
    path = tmp_path / "set.npz"
    path.write_bytes(zipped(member("arr_0", "(40, 5700, 5700, 3)", 40 * 5700 * 5700 * 3, U1)))

    def first() -> None:
        images = open_set(path)
        assert images.count == 40
        batches = images.batches(32)
        assert next(batches).shape == next(batches).shape == (1, 5700, 5700, 3)

    assert outcome(first, mib=400) == "ok"


TENSORS: dict[str, tuple[bytes, str]] = {
    "claim": (npy_header("(99999, 4, 64, 64)", "'<f4'"), "cannot hold"),
    "product": (npy_header("(99, 99, 99, 99)", "'<f4'"), "ends early"),
    "true": (npy_header("(True, 4, 2, 2)", "'<f4'"), "cannot hold"),
    "nested": (npy_header("-" * 9000 + "1"), "is not an array"),
    "object": (npy_header("(1, 4, 2, 2)", "'|O'"), "holds object"),
    "dimensions": (npy_header(f"({'1, ' * 3000})", "'<f4'"), "dimensions"),
    "pipe": (b"", "not a regular file"),
}


@linux
@pytest.mark.parametrize("kind", TENSORS)
def test_given_tensors_take_what_their_files_have(kind: str, tmp_path: Path) -> None:
    """--latents and --step-noise."""
    content, told = TENSORS[kind]
    path = tmp_path / "z.npy"
    path.write_bytes(content + bytes(64)) if content else os.mkfifo(path)
    found = outcome(read_tensor, path, mib=200)
    kind, _, message = found.partition(": ")
    assert kind in ("ValueError", "NotRegular") and "z.npy" in message and told in message, found
    assert "\n" not in found and len(found) < 400


def test_avatars_are_those_that_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "avatars-train-8px-2.npy"
    np.save(path, np.zeros((2 * len(CLASSES), 8, 8, 3), np.uint8))
    assert len(load_avatars(tmp_path, "train", 2, 8)) == 2 * len(CLASSES)
    np.save(path, np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"8px-2.npy is uint8 \(1, 8, 8, 3\); uint8 \(32, 8, 8"):
        load_avatars(tmp_path, "train", 2, 8)


def test_labels_of_latents_are_no_more_than_there_are_classes(tmp_path: Path) -> None:
    """A network that is trained on the latents has an embedding for each class."""
    path, z = tmp_path / "latents.safetensors", torch.zeros(3, 4, 8, 8, dtype=torch.float16)
    good = {"means": z, "deviations": z + 1, "labels": torch.arange(3)}
    save_file(good, path)
    assert [part.shape[0] for part in read_latents(path, 3)] == [3, 3, 3]
    with pytest.raises(ValueError, match="from 0 to 1"):
        read_latents(path, 2)
    for tensors, told in (
        ({"labels": torch.tensor([0, 1, 10**12])}, "labels that are not integers from 0 to 2"),
        ({"labels": torch.zeros(3)}, "labels that are not integers"),
        ({"labels": torch.arange(2)}, "means <float16 "),
        ({"deviations": z[:, :2].clone()}, "means <float16 "),
    ):
        save_file(good | tensors, path)
        with pytest.raises(ValueError, match=re.escape(str(path))) as refused:
            read_latents(path)
        assert told in str(refused.value) and "\n" not in str(refused.value)
