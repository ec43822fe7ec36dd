"""Recognise what a file is by its first bytes, for messages."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from dit_engine.io.files import regular_size

SAFETENSORS = "a safetensors file"
PYTORCH = "a PyTorch file"
JSON = "a JSON file"
NUMPY = "a NumPy array (.npy)"
_ZIP = "a zip archive"

_SERVER = "the server answered with it in place of the file, perhaps to ask for a login"
# What to do with each kind of file; the pattern matches the beginning of the kind's name.
_ADVICE = (
    (r"a Git LFS pointer", "fetch the file that it stands for with 'git lfs pull'"),
    (r"a git-annex pointer", "fetch the file that it stands for with 'git annex get'"),
    (r"a web page|an XML document", _SERVER),
    (SAFETENSORS, "rename it to end in .safetensors"),
    (PYTORCH, "rename it to end in .pt"),
    (r"a TorchScript archive", "save its state_dict() with torch.save"),
    (r".* archive", "unpack it first"),
)

# (offset, bytes, the kind of file that has them there). The header of
# safetensors comes after its length of 8 bytes.
_MAGIC = (
    (8, b'{"', SAFETENSORS),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"BZh", "a bzip2 archive"),
    (0, b"\xfd7zXZ\x00", "an xz archive"),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!\x1a\x07", "a RAR archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x93NUMPY", NUMPY),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (0, b"GGUF", "a GGUF file"),
    (0, b"TFL3", "a TensorFlow Lite model"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"%PDF", "a PDF document"),
    (0, b"\x7fELF", "a program or library"),
)
_TENSORFLOW_END = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"  # of a table, as in model.ckpt.index


def check_format(path: Path, wanted: str) -> None:
    """Raise a ValueError that says what a file is, if it is recognised and is not ``wanted``.

    Other files pass, and their reader says what is wrong. Raises OSError if it cannot be read.
    """
    found = format_of(path)
    if found is None or found == wanted or (found, wanted) == (_ZIP, PYTORCH):
        return
    advice = next((f"; {text}" for kind, text in _ADVICE if re.match(kind, found)), "")
    raise ValueError(f"{path}: {found}, not {wanted}{advice}")


def format_of(path: Path) -> str | None:
    """What a file is, such as "a safetensors file" or "a web page"; None if it is not recognised.

    Raises `NotRegular` for a directory, a pipe or a device, OSError if it cannot be read.
    """
    size = regular_size(path)
    with path.open("rb") as file:
        head = file.read(1024)
        file.seek(max(size - 8, 0))
        end = file.read(8)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if re.match(rb"version https?://[\w.-]+/spec/v\d", text):
        stated = re.search(rb"^size (\d{1,18})\b", head, re.MULTILINE)
        return "a Git LFS pointer" + (f" (to {stated[1].decode()} bytes)" if stated else "")
    if text.startswith((b"/annex/objects/", b"../.git/annex/", b".git/annex/objects/")):
        return "a git-annex pointer"
    if re.match(
        rb"(<!--.*?-->\s*)?<(!doctype\s+html|html|head|body|title|script)\b", text, re.DOTALL
    ):
        return "a web page"
    if text.startswith(b"<?xml"):
        return "a web page" if b"<html" in text else "an XML document"
    if head.startswith(b"PK\x03\x04"):
        return _zip_format(path)
    if re.match(rb"\x80[\x02-\x05]", head):
        return PYTORCH  # a bare pickle, as before torch 1.6
    for offset, magic, name in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return name
    if end == _TENSORFLOW_END:
        return "a TensorFlow checkpoint"
    if re.match(rb'\{\s*["}]|\[\s*["\[{\d\]]', text):
        return JSON
    return None


def _zip_format(path: Path) -> str | None:
    """The kind of a zip file; None if its end, where the list of contents is, is cut off."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return None
    last = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in last:
        return "a TorchScript archive"
    if "data.pkl" in last:
        return PYTORCH
    if "config.json" in last and "model.weights.h5" in last:
        return "a Keras model"
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz)"
    return _ZIP
