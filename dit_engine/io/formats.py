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

# (offset, bytes, the kind of file that has them there). The header of safetensors comes after its
# length of 8 bytes.
_MAGIC = (
    (8, b'{"', SAFETENSORS),
    # Bare pickles, as before torch 1.6, of protocols 2 to 5.
    *((0, bytes((0x80, protocol)), PYTORCH) for protocol in (2, 3, 4, 5)),
    (0, b"\x1f\x8b", "a gzip archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x93NUMPY", NUMPY),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
)
# Patterns of the beginning, in small letters and without white space before it.
_TEXTS = (
    (rb"version https?://[\w.-]+/spec/v\d", "a Git LFS pointer"),
    (rb"/annex/objects/|(\.\./)?\.git/annex/", "a git-annex pointer"),
    (rb"(<!--.*?-->\s*)?<(!doctype\s+html|html|head|body|title|script)\b", "a web page"),
    (rb"<\?xml.*<html", "a web page"),
    (rb"<\?xml", "an XML document"),
    (rb'\{\s*["}]|\[\s*["\[{\d\]]', JSON),
)
# The last part of a name in a zip file → the kind of file.
_ZIPPED = {"constants.pkl": "a TorchScript archive", "data.pkl": PYTORCH}


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
    regular_size(path)
    with path.open("rb") as file:
        head = file.read(1024)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"PK\x03\x04"):
        return _zip_format(path)
    for offset, magic, name in _MAGIC:
        if head.startswith(magic, offset):
            return name
    return next((name for pattern, name in _TEXTS if re.match(pattern, text, re.DOTALL)), None)


def _zip_format(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # its end may be cut off
        return None
    last = {name.rpartition("/")[2] for name in names}
    for name, kind in _ZIPPED.items():
        if name in last:
            return kind
    return "a NumPy archive (.npz)" if last and all(n.endswith(".npy") for n in last) else _ZIP
