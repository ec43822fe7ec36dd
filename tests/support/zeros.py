"""Make small files by hand: PNGs, and archives that inflate to zeros which are never made."""

from __future__ import annotations

import struct
import zlib


def raw_deflate(size: int, before: bytes = b"") -> bytes:
    """``before`` and ``size`` zeros, compressed by Deflate; one compressed block is repeated."""
    first, packing, rest = (zlib.compressobj(9, wbits=-15) for _ in range(3))
    block = packing.compress(bytes(2**20)) + packing.flush(zlib.Z_FULL_FLUSH)
    count, left = divmod(size, 2**20)
    head = first.compress(before) + first.flush(zlib.Z_FULL_FLUSH)
    return head + block * count + rest.compress(bytes(left)) + rest.flush()


def zlib_stream(size: int) -> bytes:
    """``size`` zeros, compressed as in PNG and TIFF, with their Adler-32."""
    return b"x\xda" + raw_deflate(size) + struct.pack(">HH", size % 65521, 1)


def npy_header(shape: str, dtype: str = "'<f8'") -> bytes:
    """The header of a .npy file; ``shape`` and ``dtype`` are Python literals."""
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def zipped(members: list[tuple[str, bytes, int]], method: int = 8, flags: int = 0) -> bytes:
    """A zip archive of members (name, compressed data, stated size). Checksums of large members are
    wrong, because nothing should read such a member to its end."""
    body, directory = b"", b""
    for name, packed, size in members:
        small = method == 8 and size < 2**16
        crc = zlib.crc32(zlib.decompress(packed, wbits=-15)) if small else 0
        facts = struct.pack("<HHHHHIIIHH", 20, flags, method, 0, 0, crc, len(packed), size,
                            len(name), 0)  # fmt: skip
        directory += b"PK\1\2" + struct.pack("<H", 20) + facts
        directory += struct.pack("<HHHII", 0, 0, 0, 0, len(body)) + name.encode()
        body += b"PK\3\4" + facts + name.encode() + packed
    count = len(members)
    end = struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), len(body), 0)
    return body + directory + b"PK\5\6" + end


def chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side: int, bits: int, colour: int, packed: bytes, *more: bytes) -> bytes:
    """A PNG of ``packed``, the rows that zlib compressed; more: chunks before them."""
    header = struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, 0)
    return b"".join([b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *more,
                     chunk(b"IDAT", packed), chunk(b"IEND", b"")])  # fmt: skip
