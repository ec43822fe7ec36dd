"""Read the pixels of a picture, with memory that is bounded by the size of its file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_engine.io.files import NotRegular, regular_size
from dit_engine.io.formats import check_format, format_of

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow tries only these readers (it also has one that starts a program). GIF is one of them,
# because many GIFs are named .jpg.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 178_956_970  # of one picture; Pillow's own limit, whatever a program has set it to
# A picture of one colour can have thousands of pixels per byte, and would take gigabytes. So
# pictures larger than a frame of 8K (7680×4320) may have at most 32 pixels per byte of their file;
# photographs have 2 to 20.
FREE_PIXELS = 2**25
_PIXELS_PER_BYTE = 32
_STRIP = 2**22  # pixels whose colours are converted at once

BACKGROUND = "white"  # behind what is transparent

_ORIENTATION = 0x0112  # the EXIF tag
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT, _TILE_WIDTH, _TILE_HEIGHT = 258, 262, 339, 322, 323  # of TIFF


class Unreadable(ValueError):
    """The reason why a file is refused; `open_image` adds the path to its message."""


@contextmanager
def open_image(path: Path, content: bytes | None = None) -> Iterator[Image]:
    """The first frame of a picture; its pixels are read when they are first used.

    All pictures are opened here. Everything that Pillow raises, here or in the block, becomes a
    one-line ValueError that names the file. Pillow's warnings name no file, and are dropped.

    content: the file's bytes, if they are in memory; ``path`` then only names it in errors.
    """
    from PIL import Image, UnidentifiedImageError

    opened = False
    try:
        size = regular_size(path) if content is None else len(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = path if content is None else io.BytesIO(content)
            with Image.open(source, formats=_FORMATS) as image:
                check_pixels(image.width, image.height, size)
                check_pixels(_tag(image, _TILE_WIDTH, 0)[0], _tag(image, _TILE_HEIGHT, 0)[0], size)
                opened = True
                yield image
    except MemoryError:
        raise MemoryError(f"{path} does not fit in memory") from None
    except NotRegular:
        raise
    except Exception as error:  # damage can raise almost anything
        unknown = isinstance(error, UnidentifiedImageError) and content is None
        if unknown and not (format_of(path) or "").endswith(" image"):
            check_format(path, "an image")  # says what it is, where that is recognised
        damaged = opened and not isinstance(error, Unreadable)
        what = "is damaged" if damaged else "is not a readable image"
        reason = getattr(error, "strerror", None) or str(error)
        reason = " ".join(reason.split(" '")[0].split())  # without Pillow's "… file 'path'"
        raise ValueError(f"{path} {what} ({reason or type(error).__name__})") from None


def check_pixels(width: int, height: int, size: int) -> None:
    """Raise `Unreadable` if a picture, or a tile of it, has more pixels than are allowed in a file
    of ``size`` bytes. (A tile of a TIFF is decoded as a whole, and may be larger than the picture.)
    """
    bound = min(max(FREE_PIXELS, _PIXELS_PER_BYTE * size), MAX_PIXELS)
    if width * height > bound:
        raise Unreadable(
            f"{width}×{height} pixels; {bound} in all are allowed in a file of {size} bytes"
        )


def read_rgb(path: Path) -> Image:
    """A picture as a viewer shows it, in mode RGB.

    It is turned by its EXIF orientation, grey of 16 bits is scaled to 8, and what is transparent
    lies on `BACKGROUND`. Colour profiles are not applied.

    Raises ValueError for what `open_image` or `_conversion` refuses, and for transparent values of
    16 bits, of which Pillow keeps 8.
    """
    from PIL.Image import Transpose

    turns = (
        None, None, Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM,
        Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90,
    )  # fmt: skip
    with open_image(path) as image:
        _scale_transparent(image)
        image.load()  # which also turns the pixels of a TIFF
        rgb, turn = _on_background(image), turns[_orientation(image)]
        return rgb if turn is None else rgb.transpose(turn)


def has_orientation(image: Image) -> bool:
    """Whether the file says that its pixels are to be turned; the pixels are not read for this."""
    return "exif" in image.info and _orientation(image) != 1


def _on_background(image: Image) -> Image:
    from PIL import Image

    # In strips, because intermediate copies of a large picture would take many times its memory.
    convert = _conversion(image)
    width, height = image.size
    rows = max(_STRIP // width, 1)
    if height <= rows:
        return convert(image)
    whole = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        whole.paste(convert(strip), (0, top))
    return whole


def _conversion(image: Image) -> Callable[[Image], Image]:
    sixteen = image.mode.startswith("I;16")
    if sixteen or (image.mode == "I" and image.format in ("PNG", "PPM")):
        usual = _tag(image, _BITS, 16) == (16,) and _tag(image, _PHOTOMETRIC, 1) == (1,)
        if usual or image.format != "TIFF":
            return _eight_bits
    if sixteen or image.mode in ("I", "F", "LAB") or 2 in _tag(image, _SAMPLE_FORMAT, 1):
        raise Unreadable(
            f"mode {image.mode}: LAB, grey of 12 bits or with white at 0, and signed, 32-bit and "
            "floating-point pixels are not supported; save 8 or 16 bits"
        )
    return _flattened if image.has_transparency_data else lambda part: part.convert("RGB")


def _flattened(image: Image) -> Image:
    from PIL import Image

    front = image.convert("LA") if image.mode == "La" else image
    front = front.convert("RGBA")
    behind = Image.new("RGBA", front.size, BACKGROUND)
    return Image.alpha_composite(behind, front).convert("RGB")


def _tag(image: Image, tag: int, default: int) -> tuple[int, ...]:
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return value if isinstance(value, tuple) else (value,)


def _scale_transparent(image: Image) -> None:
    """Pillow scales a PNG's grey of 2 and 4 bits to 8, but not the grey that is transparent.

    Call this before the pixels are read: afterwards their values in the file are unknown.
    """
    clear, tiles = image.info.get("transparency"), getattr(image, "tile", None)
    if image.format != "PNG" or clear is None or not tiles:
        return
    stored: Any = tiles[0].args
    if stored in ("RGB;16B", "I;16B"):
        raise Unreadable("a transparent value of 16 bits is not supported; save an alpha channel")
    if stored in ("L;2", "L;4"):
        image.info["transparency"] = clear * (85 if stored == "L;2" else 17)


def _eight_bits(image: Image) -> Image:
    from PIL import Image

    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")


def _orientation(image: Image) -> int:
    """1 to 8, as EXIF numbers them; 1 (upright) where the EXIF data cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data; the pixels may still be good
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1
