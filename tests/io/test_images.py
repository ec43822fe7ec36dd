"""Pictures in folders: which are found, and their pixels, beside Pillow and closed forms."""

from __future__ import annotations

import os
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps
from zeros import chunk, png

from dit_bench.quality.image_sets import open_set
from dit_engine.io import images
from dit_engine.io.folders import find_images
from dit_engine.io.images import read_rgb
from dit_engine.training.data import load_image_folder

SIDE = 8


def random_rgb(seed: int = 0, shape: tuple[int, ...] = (SIDE, SIDE, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(path: Path, pixels: np.ndarray | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random_rgb() if pixels is None else pixels).save(path, **options)
    return path


def handmade(path: Path, side: int, bits: int, colour: int, rows: bytes, *more: bytes) -> Path:
    path.write_bytes(png(side, bits, colour, zlib.compress(rows), *more))
    return path


@pytest.mark.parametrize("suffix", ["png", "tif"])  # Pillow turns the pixels of a TIFF itself
def test_images_stand_as_a_viewer_shows_them(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        saved(path, random_rgb(shape=(6, 10, 3)), exif=exif)
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image))
        np.testing.assert_array_equal(np.asarray(read_rgb(path)), expected)
        assert expected.shape[:2] == ((10, 6) if orientation > 4 else (6, 10))
    pixels = random_rgb()  # damaged EXIF data cost the orientation alone
    saved(path, pixels, exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    np.testing.assert_array_equal(np.asarray(read_rgb(path)), pixels)


def tiff(
    path: Path, order: str, bits: int, data: bytes, white: int = 1, signed: bool = False
) -> Path:
    """A grey picture of 8×8. white: 1 where the greatest value is white, 0 where 0 is."""
    numbers = {256: 8, 257: 8, 258: bits, 262: white, 278: 8, 279: len(data),
               273: 8 + 2 + 12 * 8 + 4, 339: 1 + signed}  # fmt: skip
    entries = (struct.pack(f"{order}HHII", tag, 4, 1, n) for tag, n in sorted(numbers.items()))
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(f"{order}IH", 8, len(numbers)) + b"".join(entries) + bytes(4)
    path.write_bytes(head + data)
    return path


@pytest.mark.parametrize("kind", ["png", "pgm", "<.tif", ">.tif"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, kind: str) -> None:
    values, path = np.linspace(0, 65535, 64).round().reshape(8, 8).astype(">u2"), tmp_path / kind
    if kind == "pgm":
        path.write_bytes(b"P5 8 8 65535\n" + values.tobytes())
    elif kind == "png":
        handmade(path, 8, 16, 0, b"".join(b"\0" + row.tobytes() for row in values))
    else:
        tiff(path, kind[0], 16, values.astype(f"{kind[0]}u2").tobytes())
    expected = np.round(values.astype(int) / 65535 * 255).astype(np.uint8)
    got = np.asarray(read_rgb(path))
    assert all((got[..., c] == expected).all() for c in range(3))


def test_pixels_without_a_known_range_are_refused(tmp_path: Path) -> None:
    for kind in (np.float32, np.int32):
        saved(tmp_path / f"{kind.__name__}.tif", np.arange(64).astype(kind).reshape(8, 8))
    for name, bits, white, signed in (("8", 8, 1, True), ("16", 16, 1, True),
                                      ("12", 12, 1, False), ("white", 16, 0, False)):  # fmt: skip
        tiff(tmp_path / f"{name}.tif", "<", bits, bytes(8 * bits), white, signed)
    Image.new("LAB", (8, 8)).save(tmp_path / "lab.tif")
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=r"\.tif is not a readable image \(mode .*: LAB, grey"):
            read_rgb(path)


def test_a_transparent_grey_of_every_depth(tmp_path: Path) -> None:
    """Black is transparent, then the value 1; the other pixel stays as it is."""
    path = tmp_path / "x.png"
    for bits in (1, 2, 4, 8):
        for clear, other in ((0, 1), (1, 0)):
            row = (clear << bits | other) << (8 - 2 * bits if bits < 8 else 0)
            rows = 2 * (b"\0" + row.to_bytes(max(1, bits // 4), "big"))
            handmade(path, 2, bits, 0, rows, chunk(b"tRNS", struct.pack(">H", clear)))
            shown = round(255 * other / (2**bits - 1))
            assert np.asarray(read_rgb(path))[..., 0].tolist() == 2 * [[255, shown]]
    for colour, key in ((0, bytes(2)), (2, bytes(6))):
        handmade(path, 1, 16, colour, b"\0" + key, chunk(b"tRNS", key))
        with pytest.raises(ValueError, match=r"x\.png is .* \(a transparent value of 16 bits"):
            read_rgb(path)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "colour key"])
def test_what_is_transparent_lies_on_white(tmp_path: Path, kind: str) -> None:
    """By the definition of "over" in float64; Pillow rounds each of two steps."""
    path = tmp_path / "x.png"
    pixels = random_rgb(shape=(SIDE, SIDE, {"RGBA": 4, "LA": 2}.get(kind, 3)))
    if kind == "palette":
        indices, palette, alphas = pixels[..., 0] % 4, random_rgb(1, (4, 3)), (255, 0, 100, 255)
        image = Image.fromarray(indices).convert("P")
        image.putdata(indices.reshape(-1).tolist())
        image.putpalette(palette.reshape(-1).tolist())
        image.save(path, transparency=bytes(alphas))
        colour, alpha = palette[indices], np.array(alphas)[indices][..., None]
    elif kind == "colour key":
        saved(path, pixels, transparency=tuple(pixels[2, 3].tolist()))
        colour, alpha = pixels, 255 * (pixels != pixels[2, 3]).any(-1, keepdims=True)
    else:
        saved(path, pixels)
        colour, alpha = pixels[..., :-1], pixels[..., -1:]
    expected = np.broadcast_to(colour * (alpha / 255) + 255 - alpha, (SIDE, SIDE, 3))
    assert np.abs(np.asarray(read_rgb(path)) - expected).max() <= 1


def tree(root: Path) -> Path:
    """Class a with two images and much that is none; class b with one."""
    a = root / "set" / "a"
    saved(root / "store" / "y.png")
    saved(a / "x.png")
    (a / "more").symlink_to(root / "store")
    for name in ("._x.png", ".ipynb_checkpoints/x-checkpoint.png", "__MACOSX/z.png", "deep/.z.png"):
        saved(a / name)
    (a / "again").symlink_to(root / "store")  # read once
    (root / "store" / "back").symlink_to(root / "set")  # would bring b's images to a
    (a / "up").symlink_to("/")
    (a / "gone.png").symlink_to(root / "nothing.png")
    (a / "self.png").symlink_to("self.png")
    os.mkfifo(a / "pipe.png")
    for name in ("y.gif", "z.GIF", "notes.txt", "README"):
        (a / name).write_bytes(b"?")
    (root / "set" / "b").symlink_to(root / "store")
    (root / "set" / "loop").symlink_to(".")
    saved(root / "set" / ".hidden" / "x.png")
    (root / "set" / "list.csv").write_text("")
    return root / "set"


LEFT_OUT = {"hidden": 4, "link to a folder that is read anyway": 3, "link to nothing": 2,
            "no regular file": 1, ".gif": 2, ".txt": 1, "without a suffix": 1}  # fmt: skip


def test_which_images_are_found(tmp_path: Path) -> None:
    """Training and FID find the same, and count the rest once."""
    root, left_out = tree(tmp_path), Counter[str]()
    # "again" and "more" are one folder; which of the two names it is read by does not matter.
    assert {p.name for p in find_images(root / "a", left_out)} == {"y.png", "x.png"}
    assert left_out == LEFT_OUT
    with pytest.warns(UserWarning, match=" left out ") as told:
        data = load_image_folder(root, SIDE)
    assert len(told) == 1 and data.class_names == ("a", "b")
    assert data.labels.tolist() == [0, 0, 1]
    # In the root: a hidden folder, a loop, a list; in b: a link to what holds it.
    message = str(told[0].message)
    assert "5 hidden" in message and "2 .gif" in message and f"{root}: " in message
    with pytest.warns(UserWarning, match="2 .gif") as told:
        assert open_set(root).count == 2  # of a set, one folder is read once
    assert len(told) == 1


def test_fid_reads_the_published_tools_pixels_and_tells_what_they_ignore(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    saved(tmp_path / "s" / "0.png", exif=exif)
    pixels = random_rgb(2, (SIDE, SIDE, 4))
    saved(tmp_path / "s" / "1.png", pixels)
    said = "1 with an EXIF orientation, 1 with an alpha channel"
    with pytest.warns(UserWarning, match=said) as told:
        source = open_set(tmp_path / "s")
    assert len(told) == 1
    np.testing.assert_array_equal(next(source.batches(2)), [random_rgb(), pixels[..., :3]])


def test_whatever_pillow_raises_is_one_line_with_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {
        "short.png": png(8, 8, 0, zlib.compress(bytes(72)))[:40],
        "number.ppm": b"P6 4 x 255\n" + bytes(48),
    }
    for name, data in bad.items():
        path = tmp_path / name / "a" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        for read in (
            lambda folder: load_image_folder(folder, SIDE),
            lambda folder: list(open_set(folder).batches(1)),
        ):
            said = rf"{name} (is not a readable image|is damaged) \(.+\)"
            with pytest.raises(ValueError, match=said) as refused:
                read(tmp_path / name)
            assert "\n" not in str(refused.value)
    path = saved(tmp_path / "x.png")
    with monkeypatch.context() as patch:
        patch.setattr(images, "MAX_PIXELS", SIDE * SIDE - 1)  # whatever Pillow's limit is
        with pytest.raises(ValueError, match="8×8 pixels; 63 in all are allowed"):
            read_rgb(path)

    def fail(_: ImageFile.ImageFile) -> None:
        raise struct.error("b")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ValueError, match=r"x\.png is damaged \(b\)$"):
        read_rgb(path)


def test_folders_whose_names_are_one_are_refused(tmp_path: Path) -> None:
    """An "é" of one letter and one of two. Names that differ in their case are two."""
    one, other = "\u00e9", "e\u0301"
    for name in ("a", "A", one, other):
        saved(tmp_path / name / "x.png")
    with pytest.raises(ValueError, match="are two classes of one name") as refused:
        load_image_folder(tmp_path, SIDE)
    assert ascii(str(tmp_path / one)) in str(refused.value)
    (tmp_path / other / "x.png").unlink()
    (tmp_path / other).rmdir()
    assert load_image_folder(tmp_path, SIDE).class_names == ("A", "a", one)
