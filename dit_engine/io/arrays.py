"""Read arrays from .npy and .npz files with memory that is bounded by the size of the file.

NumPy's own reader allocates whatever a header claims, and inflates a few kilobytes of an .npz to
gigabytes. Here a header may not claim more bytes than the .npy file, or the member of the .npz,
has; and only as much of a member is inflated as the caller asks for.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from dit_engine.io.files import regular_size
from dit_engine.io.printable import first_line, one_line

_KINDS = "biufcU"  # of dtypes: numbers and text, which hold no pointers to other objects
_DIMENSIONS = 8
# NumPy uses only these two. Deflate stores at most 1040 bytes in one; others have no such bound.
_PACKED, _INFLATED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED), 1040


@dataclass(frozen=True)
class StoredArray:
    """An array in an open file, whose data has not been read yet. ``source`` is for messages."""

    file: IO[bytes]
    source: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool

    def __str__(self) -> str:
        return f"{self.source} is {self.dtype} {self.shape}"

    def read(self) -> NDArray[Any]:
        """The whole array, read-only."""
        return self._next(self.shape, "F" if self.fortran else "C")

    def rows(self, count: int) -> NDArray[Any]:
        """The next ``count`` entries of the first dimension, read-only. Not for Fortran order."""
        return self._next((count, *self.shape[1:]), "C")

    def _next(self, shape: tuple[int, ...], order: Any) -> NDArray[Any]:
        size = math.prod(shape) * self.dtype.itemsize
        data = self.file.read(size)
        if len(data) != size:
            raise ValueError(f"{self.source} ends early; the file is damaged")
        return np.frombuffer(data, self.dtype, math.prod(shape)).reshape(shape, order=order)


def array_in(file: IO[bytes], size: int, source: str) -> StoredArray:
    """The array in ``file``, which has ``size`` bytes in all and is read up to the array's data.

    Raises ValueError if it is not an array of numbers or text, or claims more than the file has.
    """
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    except (OSError, zipfile.BadZipFile, zlib.error):
        raise
    except Exception as error:  # the parser of its Python literal can raise almost anything
        raise ValueError(f"{source} is not an array ({first_line(error)})") from None
    stored = StoredArray(file, source, shape, dtype, fortran)
    if dtype.kind not in _KINDS:
        raise ValueError(f"{source} holds {one_line(dtype)[:160]}; numbers are needed")
    if len(shape) > _DIMENSIONS:
        raise ValueError(f"{source} has {len(shape)} dimensions; {_DIMENSIONS} are allowed")
    if any(type(n) is not int or not 0 <= n <= size for n in shape):  # NumPy lets True pass
        raise ValueError(f"{stored}, which a file of {size} bytes cannot hold")
    if math.prod(shape) * dtype.itemsize > size - file.tell():
        raise ValueError(f"{stored} and ends early, after {size} bytes")
    return stored


def map_npy(path: Path) -> NDArray[Any]:
    """The array in a .npy file, mapped into memory, read-only. Raises ValueError as `array_in`."""
    size = regular_size(path)
    with path.open("rb") as file:
        stored = array_in(file, size, str(path))
        offset = file.tell()
    if 0 in stored.shape:  # an empty array cannot be mapped
        return np.empty(stored.shape, stored.dtype)
    order = "F" if stored.fortran else "C"
    return np.memmap(path, stored.dtype, "r", offset, stored.shape, order)


@contextmanager
def open_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an .npz as a zip archive. ValueError if it is damaged, also where the block finds it."""
    regular_size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except Exception as error:  # false entries of its directory can raise almost anything
        ours = isinstance(error, MemoryError) or str(error).startswith(str(path))
        if ours or (isinstance(error, OSError) and error.filename):  # raised by the system
            raise
        raise ValueError(f"{path} is damaged or not an .npz ({first_line(error)})") from None


@contextmanager
def open_member(path: Path, name: str) -> Iterator[StoredArray]:
    """The array ``name`` of an .npz, of which only the header has been read. Raises ValueError as
    `array_in`, and if the archive is damaged or its sizes are wrong."""
    source = f"{path}: {name}"
    with open_npz(path) as archive:
        found = [member for member in archive.infolist() if member.filename == f"{name}.npy"]
        if len(found) != 1:
            raise ValueError(f"{path} is damaged or not an .npz ({name} occurs {len(found)} times)")
        (member,) = found
        if member.compress_type not in _PACKED:
            raise ValueError(
                f"{source} is compressed by method {member.compress_type}; use Deflate"
            )
        if member.file_size > _INFLATED * regular_size(path):
            raise ValueError(f"{source} has {member.file_size} bytes, more than its file can hold")
        with archive.open(member) as file:
            yield array_in(file, member.file_size, source)
