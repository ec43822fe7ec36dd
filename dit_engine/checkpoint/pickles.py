"""Check a PyTorch file before torch reads it: its memory must be bounded by its own size.

torch's reader (``weights_only``) runs no code from the file, but it executes the instructions of a
pickle, and a few bytes of these can ask for gigabytes or for hours: text that is encoded again and
again, a thousand copies of one list, a key that takes forever to hash, tensors of any stated size.
Here the same instructions are executed on sizes only, without the data.
"""

from __future__ import annotations

import math
import mmap
import pickletools
import zipfile
from pathlib import Path
from typing import Any

DATA = "data.pkl"
# A file from before torch 1.6 has five pickles: magic number, version, sizes of C types, content,
# and keys of the storages. The data of the storages follows.
_OLD_PICKLES = 5
# Lists, tuples, calls and so on, each of which takes a hundred times the memory of its instruction.
# A file of DiT-XL/2 has 4,000; a training checkpoint with averages and optimizer has 20,000.
MOST_OBJECTS = 300_000
_SLACK = 1000

# Bytes of an element; types that are not listed have one.
_BYTES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2,
          "ComplexFloat": 8, "ComplexDouble": 16}  # fmt: skip

_LITERALS = {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
             "BINUNICODE", "SHORT_BINSTRING"}  # fmt: skip
_EMPTY = {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
_VIEWS = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
# These read or convert their tensors, which for an expanded tensor takes more than it has stored.
_COPIERS = {"torch._utils._rebuild_sparse_tensor",
            "torch._utils._rebuild_device_tensor_from_cpu_tensor"}  # fmt: skip
_OF_TYPE = "torch._tensor._rebuild_from_type_v2"
_TORCH = {
    *_VIEWS, *_COPIERS, _OF_TYPE, "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state", "torch.nn.parameter.Parameter",
    "torch._utils._rebuild_meta_tensor_no_storage", "torch.serialization._get_layout",
    "torch.Size", "torch.device",
}  # fmt: skip
_USUAL = ("torch", "collections", "builtins", "__builtin__", "_codecs", "argparse")


def check_pickle(path: Path) -> bool:
    """Raise a one-line ValueError if the file is damaged or asks for more memory than it has bytes.

    Returns whether it is a zip archive, the format since torch 1.6, which can be mapped into
    memory. Compressed archives are refused. Raises OSError if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            zipped = file.read(4) == b"PK\x03\x04"
            if zipped:
                _Pickle(_data(path), size)
                return True
            # Mapped, because read() of a file allocates whatever length the pickle states.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                for _ in range(_OLD_PICKLES):
                    if data.tell() < size:
                        _Pickle(data, size)
            return False
    except _Refused as error:
        raise ValueError(f"{path}: refused, {error}") from None
    except (MemoryError, OSError):
        raise
    except Exception as error:  # damage can raise almost anything
        reason = (str(error).splitlines() or [""])[0][:160] or type(error).__name__
        raise ValueError(f"{path}: damaged or not a PyTorch file ({reason})") from None


class _Refused(Exception):
    """The reason why an intact file is refused."""


def _data(path: Path) -> bytes:
    """The pickle in a zip archive."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED:
                raise _Refused(
                    f"{member.filename[:80]!r} in it is compressed, which torch.save never does: "
                    "unpack it, and zip it without compression"
                )
        # torch finds the first of this name in any case.
        found = [m for m in members if m.orig_filename.lower().rpartition("/")[2] == DATA]
        if len(found) != 1:
            raise ValueError(f"it holds {len(found)} of {DATA}; one is needed")
        try:
            return archive.read(found[0])
        except OSError as error:  # an entry has an impossible offset
            raise ValueError(str(error)) from None


class _Name(str):
    """The full name of a function or class that the pickle asks for."""


class _Made:
    """A list with its items, or another object that has only a size (``more``)."""

    __slots__ = ("items", "more")

    def __init__(self, size: int = 0) -> None:
        self.items: list[Any] = []
        self.more = size

    def __len__(self) -> int:
        return len(self.items) + self.more


class _Elements(int):
    """A storage or a tensor: the number of elements that it claims."""


class _Pickle:
    """Executes one pickle of a file of ``file_bytes`` bytes on sizes only.

    Attributes:
        made: objects that it makes.
        stored: bytes of its storages.
        copied: items and characters that its calls copy.
        converted: elements of tensors that `_COPIERS` read.
    """

    def __init__(self, source: Any, file_bytes: int) -> None:
        self.file_bytes = file_bytes
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[Any, Any] = {}
        self.names: list[_Name] = []
        self.storages: dict[Any, int] = {}
        self.made, self.stored, self.copied, self.converted = 0, 0, 0, 0
        for opcode, value, position in pickletools.genops(source):
            self.step(opcode.name, ord(opcode.code), value)
            if self.made > MOST_OBJECTS:
                raise _Refused(f"its pickle makes more than {MOST_OBJECTS} objects")
            if self.copied > 4 * (position or 0) + _SLACK:
                raise _Refused("its pickle copies more than it holds")

    def step(self, name: str, code: int, value: Any) -> None:
        stack = self.stack
        if name in _LITERALS:
            stack.append(value)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[value])
        elif name == "MARK":
            self.made += 1
            self.marks.append(stack)
            self.stack = []
        elif name == "TUPLE":
            items = self.marked()
            self.stack.append(tuple(items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            self.made += 1
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in _EMPTY:
            self.made += 1
            stack.append(_Made())
        elif name == "BINPERSID":
            stack.append(self.storage(stack.pop()))
        elif name == "GLOBAL":
            self.names.append(_Name(value.replace(" ", ".")))
            stack.append(self.names[-1])
        elif name in ("REDUCE", "NEWOBJ"):
            self.made += 1
            arguments = stack.pop()
            stack[-1] = self.call(stack[-1], arguments)
        elif name == "BUILD":
            self.copied += _size(stack.pop())
        elif name == "APPEND":
            item = stack.pop()
            stack[-1].items.append(item)
        elif name == "APPENDS":
            items = self.marked()
            self.stack[-1].items.extend(items)
        elif name == "SETITEM":
            _, key = stack.pop(), stack.pop()
            self.set_keys([key])
        elif name == "SETITEMS":
            self.set_keys(self.marked()[::2])
        elif name not in ("PROTO", "STOP"):
            raise ValueError(f"Unsupported operand {code}")

    def marked(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def set_keys(self, keys: list[Any]) -> None:
        for key in keys:
            _check_key(key)
        self.stack[-1].more += len(keys)

    def storage(self, identity: Any) -> _Elements:
        kind, key, elements = identity[1], identity[2], identity[4]
        if not isinstance(elements, int) or elements < 0:
            raise ValueError("a storage without a size")
        size = elements * _BYTES.get(str(kind).rpartition(".")[2].removesuffix("Storage"), 1)
        self.stored += max(0, size - self.storages.get(key, 0))
        self.storages[key] = max(size, self.storages.get(key, 0))
        if self.stored > self.file_bytes:
            raise ValueError(f"its tensors take {self.stored} bytes, the file {self.file_bytes}")
        return _Elements(elements)

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise ValueError("a call of something that is not a function")
        if function.startswith("torch.") and function not in _TORCH:
            foreign = (name for name in self.names if name.partition(".")[0] not in _USUAL)
            asked = str(next(foreign, function))
            raise _Refused(f"the pickle asks for {asked!r}; only tensors are loaded")
        if function == _OF_TYPE:
            return self.call(arguments[0], arguments[2])
        short = function.rpartition(".")[2]
        if short in ("encode", "bytearray") and not (
            not arguments or (isinstance(arguments[0], str | _Made) and _is_latin(arguments[1:]))
        ):
            raise _Refused(f"the pickle makes bytes by {str(function)!r} of other than latin1 text")
        self.copied += sum(map(_size, arguments))
        if function in _COPIERS:
            self.converted += sum(map(_elements, arguments))
            if self.converted > self.file_bytes:
                raise _Refused("its tensors claim more numbers than it has bytes")
        if not function.startswith("torch."):
            for argument in arguments:
                for item in argument.items if isinstance(argument, _Made) else ():
                    pair = item.items if isinstance(item, _Made) else item
                    _check_key(pair[0] if isinstance(pair, list | tuple) and pair else item)
        if function == "torch.Size":
            return arguments[0]
        if function in _VIEWS:
            sizes = arguments[2].items if isinstance(arguments[2], _Made) else arguments[2]
            return _Elements(abs(math.prod(sizes)))
        return _Made(sum(map(_size, arguments)))


def _is_latin(rest: tuple[Any, ...]) -> bool:
    return rest in ((), ("latin1",), ("latin-1",))


def _size(value: Any) -> int:
    """The size of a copy of ``value``, in items or characters."""
    if isinstance(value, tuple):
        return len(value) + sum(len(item) for item in value if isinstance(item, _Made))
    return len(value) if isinstance(value, str | _Made) else 1


def _elements(value: Any) -> int:
    if isinstance(value, tuple):
        return sum(item for item in value if isinstance(item, _Elements))
    return value if isinstance(value, _Elements) else 0


def _check_key(key: Any) -> None:
    """Refuse tuples of tuples as keys: if each level holds the one below twice, every level doubles
    the time of hashing."""
    if isinstance(key, tuple) and any(isinstance(item, tuple) for item in key):
        raise _Refused("its pickle has a tuple of tuples as a key")
