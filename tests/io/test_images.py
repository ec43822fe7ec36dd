"""Pictures in folders: which are found, and their pixels, beside Pillow and closed forms."""

from __future__ import annotations

import os
import re
import struct
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, ImageOps
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


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_images_stand_as_a_viewer_shows_them(tmp_path: Path, suffix: str) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = saved(tmp_path / f"x.{suffix}", random_rgb(shape=(6, 10, 3)), exif=exif)
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image))
        np.testing.assert_array_equal(np.asarray(read_rgb(path)), expected)
        assert expected.shape[:2] == ((10, 6) if orientation > 4 else (6, 10))


def test_damaged_exif_data_cost_the_orientation_alone(tmp_path: Path) -> None:
    pixels = random_rgb()
    path = saved(tmp_path / "x.png", pixels, exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    np.testing.assert_array_equal(np.asarray(read_rgb(path)), pixels)


def tiff(
    path: Path, order: str, side: int, bits: int, white: int, data: bytes, signed: bool = False
) -> Path:
    """A grey picture. white: 1 where the greatest value is white, 0 where 0 is."""
    numbers = {256: side, 257: side, 258: bits, 262: white, 278: side, 279: len(data),
               273: 8 + 2 + 12 * 8 + 4, 339: 1 + signed}  # fmt: skip
    entries = (struct.pack(f"{order}HHII", tag, 4, 1, n) for tag, n in sorted(numbers.items()))
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(f"{order}IH", 8, len(numbers)) + b"".join(entries) + bytes(4)
    path.write_bytes(head + data)
    return path


@pytest.mark.parametrize(
    ("kind", "mode"), [("png", "I;16"), ("pgm", "I"), ("<.tif", "I;16"), (">.tif", "I;16B")]
)
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, kind: str, mode: str) -> None:
    values, path = np.linspace(0, 65535, 64).round().reshape(8, 8).astype(">u2"), tmp_path / kind
    if kind == "pgm":
        path.write_bytes(b"P5 8 8 65535\n" + values.tobytes())
    elif kind == "png":
        handmade(path, 8, 16, 0, b"".join(b"\0" + row.tobytes() for row in values))
    else:
        tiff(path, kind[0], 8, 16, 1, values.astype(f"{kind[0]}u2").tobytes())
    with Image.open(path) as image:
        assert image.mode == mode
    expected = np.round(values.astype(int) / 65535 * 255).astype(np.uint8)
    got = np.asarray(read_rgb(path))
    assert all((got[..., c] == expected).all() for c in range(3))


def test_pixels_without_a_known_range_are_refused(tmp_path: Path) -> None:
    for kind in (np.float32, np.int32):
        saved(tmp_path / f"{kind.__name__}.tif", np.arange(64).astype(kind).reshape(8, 8))
    for bits in (8, 16):
        tiff(tmp_path / f"{bits}.tif", "<", 2, bits, 1, bytes(bits // 2), signed=True)
    for path in tmp_path.iterdir():
        said = r"\.tif is not a readable image \(mode [ILF].*: signed, 32-bit"
        with pytest.raises(ValueError, match=said):
            read_rgb(path)


@pytest.mark.parametrize("white", [0, 1])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_grey_tiffs_of_every_depth_with_white_at_either_end(
    tmp_path: Path, bits: int, white: int
) -> None:
    most = 2**bits - 1
    values = [0, most, most // 3, most // 5]
    data = struct.pack(f"<4{'B' if bits == 8 else 'H'}", *values)
    if bits == 12:  # two values in three bytes, each row for itself
        data = b"".join((a << 12 | b).to_bytes(3, "big") for a, b in (values[:2], values[2:]))
    path = tiff(tmp_path / "x.tif", "<", 2, bits, white, data)
    if (bits, white) == (12, 0):  # Pillow has no reader for it
        with pytest.raises(ValueError, match=r"x\.tif is not a readable image"):
            read_rgb(path)
        return
    expected = [round(255 * v / most) if white else 255 - round(255 * v / most) for v in values]
    assert np.asarray(read_rgb(path))[..., 0].reshape(-1).tolist() == expected


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_of_every_depth(tmp_path: Path, bits: int) -> None:
    """Black is transparent, then the value 1; the other pixel stays as it is."""
    for clear, other in ((0, 1), (1, 0)):
        row = (clear << bits | other) << (8 - 2 * bits if bits < 8 else 0)
        rows = 2 * (b"\0" + row.to_bytes(max(1, bits // 4), "big"))
        key = chunk(b"tRNS", struct.pack(">H", clear))
        path = handmade(tmp_path / "x.png", 2, bits, 0, rows, key)
        shown = round(255 * other / (2**bits - 1))
        assert np.asarray(read_rgb(path))[..., 0].tolist() == 2 * [[255, shown]]


def test_transparent_values_of_sixteen_bits(tmp_path: Path) -> None:
    values = np.array([[0x0909, 0xFFFF], [0x8080, 0x0908]], ">u2")
    rows, key = b"".join(b"\0" + row.tobytes() for row in values), values[0, :1].tobytes()
    path = handmade(tmp_path / "x.png", 2, 16, 0, rows, chunk(b"tRNS", key))
    assert np.asarray(read_rgb(path))[..., 1].tolist() == [[255, 255], [128, 9]]
    key = struct.pack(">3H", 1000, 2000, 3000)  # of a colour
    handmade(path, 1, 16, 2, b"\0" + key, chunk(b"tRNS", key))
    with pytest.raises(ValueError, match=r"x\.png is .* \(a transparent colour of 16 bits"):
        read_rgb(path)


def transparent(folder: Path, kind: str) -> tuple[Path, np.ndarray]:
    """A file, and its pixels on white by the definition of "over" in float64."""
    path = folder / "x.png"
    if kind in ("RGBA", "LA"):
        pixels = random_rgb(shape=(SIDE, SIDE, 4 if kind == "RGBA" else 2))
        saved(path, pixels)
        colour, alpha = pixels[..., :-1].astype(float), pixels[..., -1:] / 255
        return path, np.broadcast_to(colour * alpha + 255 * (1 - alpha), (SIDE, SIDE, 3))
    if kind == "palette":
        indices = random_rgb(shape=(SIDE, SIDE)) % 4
        image = Image.fromarray(indices).convert("P")
        palette, alphas = random_rgb(1, (4, 3)), np.array([255, 0, 100, 255])
        image.putdata(indices.reshape(-1).tolist())
        image.putpalette(palette.reshape(-1).tolist())
        image.save(path, transparency=bytes(alphas.tolist()))
        colour, alpha = palette[indices].astype(float), alphas[indices][..., None] / 255
        return path, colour * alpha + 255 * (1 - alpha)
    pixels = random_rgb(shape=(SIDE, SIDE) if kind == "grey key" else (SIDE, SIDE, 3))
    key = tuple(pixels[2, 3].tolist()) if pixels.ndim == 3 else int(pixels[2, 3])
    saved(path, pixels, transparency=key)
    clear = pixels == key if pixels.ndim == 2 else (pixels == key).all(-1)
    rgb = pixels[..., None].repeat(3, -1) if pixels.ndim == 2 else pixels
    return path, np.where(clear[..., None], 255, rgb)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "grey key", "colour key"])
def test_what_is_transparent_lies_on_white(tmp_path: Path, kind: str) -> None:
    path, expected = transparent(tmp_path, kind)
    got = np.asarray(read_rgb(path)).astype(float)
    assert got.shape == (SIDE, SIDE, 3) and np.abs(got - expected).max() <= 1  # Pillow's rounding
    assert not (expected == random_rgb()).all()


def test_lab_and_cmyk_are_converted(tmp_path: Path) -> None:
    profiles = [ImageCms.createProfile(kind) for kind in ("sRGB", "LAB")]
    rgb = Image.new("RGB", (4, 4), (200, 30, 60))
    lab = ImageCms.applyTransform(rgb, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    for image in (lab, rgb.convert("CMYK")):
        image.save(tmp_path / "x.tif")
        got = np.asarray(read_rgb(tmp_path / "x.tif"))[1, 1]
        assert np.abs(got.astype(int) - (200, 30, 60)).max() <= 1, image.mode


def test_the_first_frame_of_what_moves(tmp_path: Path) -> None:
    red, lime = (Image.new("RGB", (4, 4), c) for c in ("red", "lime"))
    for suffix in ("webp", "png", "tif"):
        path, more = tmp_path / f"x.{suffix}", {"lossless": True} if suffix == "webp" else {}
        red.save(path, save_all=True, append_images=[lime], **more)
        assert read_rgb(path).getpixel((1, 1)) == (255, 0, 0)


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
    root = tree(tmp_path)
    left_out: Counter[str] = Counter()
    found = find_images(root / "a", left_out)
    # "again" and "more" are one folder; which of the two names it is read by does not matter.
    assert [p.name for p in found] in (["y.png", "x.png"], ["x.png", "y.png"])
    assert left_out == LEFT_OUT


def test_training_and_fid_find_the_same_and_count_the_rest_once(tmp_path: Path) -> None:
    root = tree(tmp_path)
    with pytest.warns(UserWarning, match=" left out ") as told:
        data = load_image_folder(root, SIDE)
    assert len(told) == 1 and data.class_names == ("a", "b")
    assert data.labels.tolist() == [0, 0, 1]
    # In the root: a hidden folder, a loop, a list; in b: a link to what holds it.
    message = str(told[0].message)
    assert "5 hidden" in message and "2 .gif" in message and f"{root}: " in message
    with pytest.warns(UserWarning, match="2 .gif") as told:
        assert len(open_set(root).images) == 2  # of a set, one folder is read once
    assert len(told) == 1


def test_folders_with_one_kind_of_file(tmp_path: Path) -> None:
    saved(tmp_path / "plain" / "a" / "x.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image_folder(tmp_path / "plain", SIDE)
        open_set(tmp_path / "plain")
    (tmp_path / "other" / "a").mkdir(parents=True)
    (tmp_path / "other" / "a" / "x.gif").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"class 'a' holds no images \(.png, .*\), but 1 .gif"):
        load_image_folder(tmp_path / "other", SIDE)


def test_fid_reads_the_published_tools_pixels_and_tells_what_they_ignore(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    saved(tmp_path / "s" / "0.png", exif=exif)
    pixels = random_rgb(2, (SIDE, SIDE, 4))
    saved(tmp_path / "s" / "1.png", pixels)
    with pytest.warns(
        UserWarning, match="1 with an EXIF orientation, 1 with an alpha channel"
    ) as told:
        source = open_set(tmp_path / "s").images
    assert len(told) == 1
    np.testing.assert_array_equal(next(source.batches(2)), [random_rgb(), pixels[..., :3]])


def test_whatever_pillow_raises_is_one_line_with_the_path(tmp_path: Path) -> None:
    text = chunk(b"zTXt", b"c\0\0" + zlib.compress(bytes(2**21)))
    bad = {
        "bomb.png": png(14000, 1, 0, zlib.compress(bytes(14000 * (14000 // 8 + 1)))),
        "text.png": png(64, 8, 0, zlib.compress(bytes(64 * 65)), text),
        "short.png": png(8, 8, 0, zlib.compress(bytes(72)))[:40],
        "header.png": png(8, 8, 0, b"")[:20],
        "broken.tif": b"II*\0\x08\0\0\0\x01\0",
        "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "empty.webp": b"",
        "number.ppm": b"P6 4 x 255\n" + bytes(48),
    }
    for name, data in bad.items():
        path = tmp_path / name / "a" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        for read in (
            lambda folder: load_image_folder(folder, SIDE),
            lambda folder: list(open_set(folder).images.batches(1)),
        ):
            said = rf"{name} (is not a readable image|is damaged) \(.+\)"
            with pytest.raises(ValueError, match=said) as refused:
                read(tmp_path / name)
            assert "\n" not in str(refused.value)


@pytest.mark.parametrize("error", [SyntaxError("s"), struct.error("b"), EOFError(), IndexError(),
                                   OSError("truncated"), ZeroDivisionError("z")])  # fmt: skip
def test_errors_of_decoding_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = saved(tmp_path / "x.png")

    def fail(_: ImageFile.ImageFile) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ValueError, match=r"x\.png is damaged \(.+\)$"):
        read_rgb(path)


def test_pixels_are_limited_whatever_pillow_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(images, "MAX_PIXELS", SIDE * SIDE - 1)
    with pytest.raises(ValueError, match="8×8 pixels; 63 in all are allowed"):
        read_rgb(saved(tmp_path / "x.png"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5123\n",
         "a Git LFS pointer (to 5123 bytes), not an image; fetch"),
        (b"<!DOCTYPE html><html>login</html>", "a web page, not an image; the server"),
        (b"\x89PNG, but no more", "is not a readable image"),
    ],
)  # fmt: skip
def test_other_files_are_named_as_what_they_are(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        read_rgb(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_folders_whose_names_are_one_are_refused(tmp_path: Path) -> None:
    """An "é" of one letter and one of two. Names that differ in their case are two."""
    one, other = "\u00e9", "e\u0301"
    for name in ("a", "A", one, other):
        saved(tmp_path / name / "x.png")
    with pytest.raises(ValueError, match="are two classes of one name") as refused:
        load_image_folder(tmp_path, SIDE)
    assert ascii(str(tmp_path / one)) in str(refused.value)
    assert ascii(str(tmp_path / other)) in str(refused.value)
    (tmp_path / other / "x.png").unlink()
    (tmp_path / other).rmdir()
    assert load_image_folder(tmp_path, SIDE).class_names == ("A", "a", one)
