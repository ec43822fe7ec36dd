"""Read the pixels of a picture, with memory that is bounded by the size of its file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dit_engine.io.files import NotRegular, regular_size

if TYPE_CHECKING:
    from PIL.Image import Image

# Named, so that Pillow tries no other reader (it has one that starts a program). GIF is in the list
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

_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
_ORIENTATION = 0x0112  # the EXIF tag
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_TILE_WIDTH, _TILE_HEIGHT = 322, 323


class Unreadable(ValueError):
    """The reason why a file is refused; `open_image` adds the path to its message."""


@contextmanager
def open_image(path: Path, content: bytes | None = None) -> Iterator[Image]:
    """The first frame of a picture; its pixels are read when they are first used.

    All pictures are opened here. Everything that Pillow raises, here or in the block, becomes a
    one-line ValueError that names the file. Pillow's warnings name no file, and are dropped.

    Args:
        content: of the file, if it is in memory; ``path`` then only names it in errors.
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
        if isinstance(error, UnidentifiedImageError) and content is None:
            _check_kind(path)
        damaged = opened and not isinstance(error, Unreadable)
        what = "is damaged" if damaged else "is not a readable image"
        raise ValueError(f"{path} {what} ({_reason(error)})") from None


def check_pixels(width: int, height: int, size: int) -> None:
    """Raise `Unreadable` if a picture, or a tile of it, has more pixels than are allowed in a file
    of ``size`` bytes. (A tile of a TIFF is decoded as a whole, and may be larger than the picture.)
    """
    bound = max(FREE_PIXELS, _PIXELS_PER_BYTE * size)
    if width * height > min(bound, MAX_PIXELS):
        told = f"{MAX_PIXELS} in all are allowed"
        if bound < MAX_PIXELS:
            told = f"{bound} in all are allowed in a file of {size} bytes"
        raise Unreadable(f"{width}×{height} pixels; {told}")


def read_rgb(path: Path) -> Image:
    """A picture as a viewer shows it, in mode RGB.

    It is turned by its EXIF orientation, 12 and 16 bits are scaled to 8, and what is transparent
    lies on `BACKGROUND`. Colour profiles are not applied.

    Raises ValueError for what `open_image` refuses, for pixels without a known range (signed or
    32-bit integers, floating point), and for a transparent colour of 16 bits, of which Pillow keeps
    8.
    """
    with open_image(path) as image:
        _scale_transparent(image)
        image.load()  # which also turns the pixels of a TIFF
        return _upright(_on_background(image), _orientation(image))


def has_orientation(image: Image) -> bool:
    """Whether the file says that its pixels are to be turned; the pixels are not read for this."""
    return "exif" in image.info and _orientation(image) != 1


def _check_kind(path: Path) -> None:
    """Raise a ValueError that says what a file is, if it is known to be no picture at all."""
    from dit_engine.io.formats import check_format, format_of

    if not (format_of(path) or "").endswith(" image"):
        check_format(path, "an image")


def _on_background(image: Image) -> Image:
    """A picture in RGB, on `BACKGROUND` where it is transparent. It is converted in strips, because
    intermediate copies of a large picture would take many times its memory."""
    from PIL import Image

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
    """The function that converts this picture, or a strip of it, to RGB."""
    from PIL import ImageCms

    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format in ("PNG", "PPM")):
        most = 4095 if _tag(image, _BITS, 16) == (12,) else 65535
        white_is_0 = image.format == "TIFF" and _tag(image, _PHOTOMETRIC, 0) == (0,)
        return partial(_eight_bits, most=most, white_is_0=white_is_0)
    if image.mode in ("I", "F") or 2 in _tag(image, _SAMPLE_FORMAT, 1):
        raise Unreadable(
            f"mode {image.mode}: signed, 32-bit and floating-point pixels have no known range; "
            "save 8 or 16 bits"
        )
    if image.mode == "LAB":
        to_rgb = ImageCms.buildTransform(
            ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB"
        )
        return to_rgb.apply
    return _flattened if image.has_transparency_data else lambda part: part.convert("RGB")


def _flattened(image: Image) -> Image:
    from PIL import Image

    front = image.convert("LA") if image.mode == "La" else image
    front = front.convert("RGBA")
    behind = Image.new("RGBA", front.size, BACKGROUND)
    return Image.alpha_composite(behind, front).convert("RGB")


def _tag(image: Image, tag: int, default: int) -> tuple[int, ...]:
    """The numbers of a TIFF's tag; the default if there is no such tag."""
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return value if isinstance(value, tuple) else (value,)


def _scale_transparent(image: Image) -> None:
    """Pillow scales a PNG's grey of 2 and 4 bits to 8, but not the grey that is transparent.

    To be called before the pixels are read: what they are in the file is not known afterwards.
    """
    clear = image.info.get("transparency")
    if image.format != "PNG" or clear is None:
        return
    tiles = getattr(image, "tile", None)
    stored = tiles[0].args if tiles else None
    if stored == "RGB;16B":
        raise Unreadable("a transparent colour of 16 bits is not supported; save an alpha channel")
    if stored in ("L;2", "L;4"):
        image.info["transparency"] = clear * (85 if stored == "L;2" else 17)


def _eight_bits(image: Image, most: int, white_is_0: bool) -> Image:
    """Grey of 12 or 16 bits, rounded to 8; a value that means "transparent" becomes the background.

    Pillow gives it as it stands in the file, 12 bits up to 4095 and also where white is 0.
    """
    from PIL import Image

    values: NDArray[Any] = np.asarray(image).astype(np.uint32)
    grey = ((values * 255 + most // 2) // most).astype(np.uint8)
    if white_is_0:
        grey = 255 - grey
    rgb = Image.fromarray(grey).convert("RGB")
    if (clear := image.info.get("transparency")) is not None:
        rgb.paste(BACKGROUND, mask=Image.fromarray(values == clear))
    return rgb


def _orientation(image: Image) -> int:
    """1 to 8, as EXIF numbers them; 1 (upright) where the EXIF data cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data; the pixels may still be good
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(image: Image, orientation: int) -> Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }  # fmt: skip
    return image.transpose(turns[orientation]) if orientation in turns else image


def _reason(error: Exception) -> str:
    """Pillow's message without the path, as in "cannot identify image file 'path'"."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split(" '")[0].split()) or type(error).__name__
