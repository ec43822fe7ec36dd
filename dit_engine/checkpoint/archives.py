"""Check a PyTorch file before torch reads it: its memory must be bounded by its own size.

In a zip archive, torch must find what was checked here, and nothing else. torch's reader looks for
the list of members where the archive's last record says that it is, Python's reader directly before
that record. An archive can have a list at both places.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import torch

from dit_engine.checkpoint.pickles import Pickle, Refused
from dit_engine.io.printable import first_line

DATA = "data.pkl"
# The records at the end of an archive: the last record, the locator of the one for large archives,
# and that one.
_END, _LOCATOR = struct.Struct("<4s4H2IH"), struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
# A file from before torch 1.6 has five pickles: magic number, version, sizes of C types, content,
# and keys of the storages. The data of the storages follows.
_OLD_PICKLES = 5


def check_file(path: Path) -> bool:
    """Raise a one-line ValueError if the file is damaged or asks for more memory than it has bytes.

    Returns whether it can be mapped into memory: it is a zip archive, the format since torch 1.6.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                data = _read_archive(file, size)
                Pickle(data, size, len(data))
                return True
            # Mapped, because read() of a file allocates whatever length the pickle states.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                for _ in range(_OLD_PICKLES):
                    if mapped.tell() < size:
                        Pickle(mapped, size, size)
            return False
    except Refused as error:
        raise ValueError(f"{path}: refused, {error}") from None
    except (MemoryError, OSError):
        raise
    except Exception as error:  # damage can raise almost anything
        raise ValueError(f"{path}: damaged or not a PyTorch file ({first_line(error)})") from None


def _read_archive(file: BinaryIO, size: int) -> bytes:
    """The pickle of an archive, if the archive takes no more memory than the file has bytes, and no
    reader can find something else in it."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        _check_end(file, size, len(members))
        # To torch's reader, capitals and small letters are the same.
        names = Counter(m.orig_filename.lower() for m in members)
        for name, times in names.most_common(1):
            if times > 1:
                raise Refused(f"its archive holds {name[:80]!r} twice")
        found = [m for m in members if m.orig_filename.lower().rpartition("/")[2] == DATA]
        if len(found) != 1:
            raise ValueError(f"it holds {len(found)} of {DATA}; one is needed")
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED:
                raise Refused(f"{member.filename[:80]!r} in it is compressed; torch.save does not")
            if _large_fields(member.extra) > 1:
                raise Refused(f"{member.filename[:80]!r} in it has two sizes")
        holds = sum(m.file_size for m in members)
        if holds > size:
            raise Refused(f"it has {size} bytes, and says that {holds} are in it")
        try:
            data = archive.read(found[0])
        except OSError as error:  # an entry has an impossible offset
            raise ValueError(str(error)) from None
        file.seek(0)
        if torch._C.PyTorchFileReader(file).get_record(DATA) != data:
            raise Refused(f"two readers find different {DATA} in it")
    return data


def _check_end(file: BinaryIO, size: int, members: int) -> None:
    """Refuse an archive whose directory is not where its last record says, or not of that length.
    No comment may follow the record, so that there is only one place where it can be."""

    def record(kind: struct.Struct, signature: bytes, before: int) -> tuple[int, ...] | None:
        if before < kind.size:
            return None
        file.seek(before - kind.size)
        found, *values = kind.unpack(file.read(kind.size))
        return tuple(values) if found == signature else None

    wrong = Refused("its archive does not end with its directory")
    end = record(_END, b"PK\5\6", size)
    if end is None or end[-1] != 0:
        raise wrong
    *_, here, total, length, offset, _ = end
    place = size - _END.size
    locator = record(_LOCATOR, b"PK\6\7", place)
    if locator is not None:
        place -= _LOCATOR.size
        large = record(_END64, b"PK\6\6", place)
        place -= _END64.size
        if large is None or locator[1] != place or large[0] != _END64.size - 12:
            raise wrong
        *_, here, total, length, offset = large
    if offset + length != place or here != total or total != members:
        raise Refused("its archive has a directory at another place than it says")


def _large_fields(extra: bytes) -> int:
    """How many fields with sizes above 4 GiB an entry has."""
    fields = 0
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        fields += kind == 1
        extra = extra[4 + length :]
    return fields
