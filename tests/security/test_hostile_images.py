"""Pictures that start programs or take gigabytes, and pipes and devices in their place."""

from __future__ import annotations

import os
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from limits import linux, outcome
from PIL import EpsImagePlugin, Image
from zeros import chunk, png, zlib_stream

import dit_engine
from dit_bench.quality.image_sets import open_set
from dit_engine.cli.generate import main
from dit_engine.io import images
from dit_engine.io.images import read_rgb
from dit_engine.training.data import load_image_folder

EPS = """%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
(%pipe%id) (w) file
"""


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that exists once the stand-in for Ghostscript, first on PATH, was run."""
    trace, programs = tmp_path / "gs-was-run", tmp_path / "bin"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\necho ran >> '{trace}'\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return trace


def eps(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(EPS)
    return path


def test_no_picture_starts_a_program(
    ghostscript: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "a.tif"):
        data = eps(tmp_path / name / "class" / name)
        for read in (
            lambda path: load_image_folder(path.parents[1], 8),  # of a training
            lambda path: open_set(path.parent),  # of FID, and of sets that are compared in pairs
            read_rgb,
        ):
            with pytest.raises(ValueError, match=f"{name} is not a readable image") as refused:
                read(data)
            assert "\n" not in str(refused.value)
        assert main(["--like", str(data), "-o", str(tmp_path / "x.png")]) == 2
        assert f"{data} is not a readable image" in capsys.readouterr().err
    assert not ghostscript.exists()
    # The stand-in is found, and would be run.
    with pytest.raises(OSError, match=r"."), Image.open(data) as image:
        image.load()
    assert ghostscript.exists()


def test_pictures_are_opened_at_one_place() -> None:
    packages = [Path(dit_engine.__file__).parent, Path(sys.modules["dit_bench"].__path__[0])]
    opened = {
        path.name
        for package in packages
        for path in package.rglob("*.py")
        if re.search(r"\b(Image\.open|imread|read_image|decode_image)\(", path.read_text("utf-8"))
    }
    assert opened == {"images.py"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_pipes_and_devices_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reading the first would wait for a writer, and the second has no end."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "device.png"):
        with pytest.raises(ValueError, match=f"{name} is not a regular file"):
            read_rgb(tmp_path / name)
        assert main(["--like", str(tmp_path / name), "-o", str(tmp_path / "x.png")]) == 2
        assert f"{name} is not a regular file" in capsys.readouterr().err


SIDE = 13300  # 177 million pixels, just below the limit for files of any size


def zeros_png(bits: int, colour: int, *more: bytes, side: int = SIDE) -> bytes:
    """A PNG of zeros. Each row begins with the byte of its filter."""
    row = 1 + (side * bits * {0: 1, 2: 3, 3: 1, 6: 4}[colour] + 7) // 8
    return png(side, bits, colour, zlib_stream(row * side), *more)


def packed(kind: bytes, size: int) -> bytes:
    return chunk(kind, b"a\0\0" + zlib_stream(size))


def huge_tile() -> bytes:
    """A TIFF of 16×16 with one tile of zeros, which is larger than the picture."""
    data, start = zlib_stream(2**27), 8 + 2 + 12 * 10 + 4
    numbers = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 46336, 323: 46336,
               324: start, 325: len(data)}  # fmt: skip
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in numbers.items()]
    return b"".join([b"II*\0\x08\0\0\0\x0a\0", *entries, bytes(4), data])


TOO_MANY = r"not a readable image \(13300×13300 pixels; 33554432 in all are allowed in a file of "
BOMBS = {
    "one bit": ("a.png", lambda: zeros_png(1, 0), TOO_MANY),
    "header alone": ("a.ppm", lambda: b"P6 13300 13300 255\n", TOO_MANY),
    "GIF": ("a.gif.png", lambda: b"GIF89a" + struct.pack("<HHBBB", SIDE, SIDE, 0, 0, 0) + b",",
            r"is not a readable image \("),
    "tile": ("a.tif", huge_tile,
             r"\(46336×46336 pixels; 33554432 in all are allowed in a file"),
    "text": ("a.png", lambda: zeros_png(8, 2, *[packed(b"zTXt", 2**20)] * 70, side=8),
             "is not a readable image .*text"),
    "profile": ("a.png", lambda: zeros_png(8, 2, packed(b"iCCP", 2**27), side=8),
                "is not a readable image .*large"),
}  # fmt: skip


@linux
@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_takes_little_memory(kind: str, tmp_path: Path) -> None:
    name, make, told = BOMBS[kind]
    path = tmp_path / name
    path.write_bytes(make())
    assert path.stat().st_size < 700_000
    found = outcome(read_rgb, path, mib=350)
    assert re.search(told, found), found
    assert "\n" not in found and (found == "ok" or found.startswith(("ValueError", "MemoryError")))


@linux
def test_a_flat_frame_of_8k_is_read_in_strips(tmp_path: Path) -> None:
    """Each of the copies between RGBA and RGB would be another 127 MiB."""
    path = tmp_path / "a.png"
    path.write_bytes(zeros_png(8, 6, side=5760))
    assert outcome(read_rgb, path, mib=400) == "ok"


def test_strips_join_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (23, 7, 4), np.uint16)
    for image in (Image.fromarray(values.astype(np.uint8)), Image.fromarray(values[..., 0])):
        image.save(tmp_path / "a.tif")
        whole = np.asarray(read_rgb(tmp_path / "a.tif"))
        with monkeypatch.context() as patch:
            patch.setattr(images, "_STRIP", 3 * 7)
            np.testing.assert_array_equal(np.asarray(read_rgb(tmp_path / "a.tif")), whole)
