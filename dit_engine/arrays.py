"""Arrays in .npy and .npz files: what a header claims is looked at before anything is read.

NumPy's own reader takes memory as the header asks for it, and inflates what a few kilobytes of an
.npz say are gigabytes. Here a header may claim no more bytes than the file has, or the member of
the .npz, and of a member as much is inflated as is asked for.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dit_engine.files import regular_size
from dit_engine.printable import first_line, one_line

T = TypeVar("T")

_KINDS = "biufcU"  # of dtypes: numbers and text, of which nothing else is in memory
_DIMENSIONS = 8
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # NumPy's; others have no bound of their size
_INFLATED = 1040  # the most bytes that Deflate makes of one


@dataclass(frozen=True)
class StoredArray:
    """An array in an open file, which is read from its beginning.

    source: what it is, for messages.
    """

    file: IO[bytes]
    source: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool

    def __str__(self) -> str:
        return f"{self.source} is {self.dtype} {self.shape}"

    def read(self) -> NDArray[Any]:
        """The whole array, read-only."""
        order = "F" if self.fortran else "C"
        return self._next(math.prod(self.shape)).reshape(self.shape, order=order)

    def rows(self, count: int) -> NDArray[Any]:
        """The next so many entries of the first dimension, read-only; not in Fortran order."""
        part = (count, *self.shape[1:])
        return self._next(math.prod(part)).reshape(part)

    def _next(self, count: int) -> NDArray[Any]:
        size = count * self.dtype.itemsize
        data = self.file.read(size)
        if len(data) != size:
            raise ValueError(f"{self.source} ends early; the file is damaged")
        return np.frombuffer(data, self.dtype, count)


def array_in(file: IO[bytes], size: int, source: str) -> StoredArray:
    """The array whose header ``file``, of ``size`` bytes in all, begins with.

    Raises ValueError where it is no array, holds anything but numbers or text, or claims more than
    the file has.
    """
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    except (OSError, zipfile.BadZipFile, zlib.error):
        raise
    except Exception as error:  # a header is Python, and can make its parser raise almost anything
        raise ValueError(f"{source} is no array ({first_line(error)})") from None
    stored = StoredArray(file, source, shape, dtype, fortran)
    if dtype.kind not in _KINDS:
        raise ValueError(f"{source} holds {one_line(dtype)[:160]}; numbers are needed")
    if len(shape) > _DIMENSIONS:
        raise ValueError(f"{source} has {len(shape)} dimensions; {_DIMENSIONS} are allowed")
    if any(not 0 <= n <= size for n in shape):
        raise ValueError(f"{stored}, which a file of {size} bytes cannot hold")
    if math.prod(shape) * dtype.itemsize > size - file.tell():
        raise ValueError(f"{stored} and ends early, after {size} bytes")
    return stored


def map_npy(path: Path) -> NDArray[Any]:
    """The array in a .npy file, mapped into memory, read-only.

    Raises ValueError as `array_in`, OSError where the file cannot be read.
    """
    size = regular_size(path)
    with path.open("rb") as file:
        stored = array_in(file, size, str(path))
        offset = file.tell()
    order = "F" if stored.fortran else "C"
    if 0 in stored.shape:  # nothing cannot be mapped
        return np.empty(stored.shape, stored.dtype)
    return np.memmap(path, stored.dtype, "r", offset, stored.shape, order)


@contextmanager
def open_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """The zip archive that an .npz is; damage that shows within the block is a ValueError, too."""
    regular_size(path)
    try:
        with _opened(path, partial(zipfile.ZipFile, path)) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise _damaged(path, error) from None


@contextmanager
def open_member(path: Path, name: str) -> Iterator[StoredArray]:
    """The array ``name`` of an .npz, of which nothing but the header has been read.

    Raises ValueError as `array_in`, and where the archive is damaged or lies about its sizes.
    """
    source = f"{path}: {name}"
    with open_npz(path) as archive:
        found = [member for member in archive.infolist() if member.filename == f"{name}.npy"]
        if len(found) != 1:
            raise ValueError(f"{path} is damaged or no .npz ({name} is there {len(found)} times)")
        (member,) = found
        if member.compress_type not in _PACKED:
            raise ValueError(f"{source} is packed by method {member.compress_type}; use Deflate")
        if member.file_size > _INFLATED * regular_size(path):
            raise ValueError(f"{source} has {member.file_size} bytes, more than its file can hold")
        with _opened(path, partial(archive.open, member)) as file:
            yield array_in(file, member.file_size, source)


def _opened(path: Path, function: Callable[[], T]) -> T:
    """What ``function`` returns; lies in an archive's directory can make it raise anything."""
    try:
        return function()
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename:  # the system's
            raise
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged or no .npz ({first_line(error)})")
