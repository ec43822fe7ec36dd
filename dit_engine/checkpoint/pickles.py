"""Execute a pickle's instructions on sizes only, to know what torch would make of them.

torch's reader (``weights_only``) runs no code from the file, but it executes the instructions of a
pickle, and a few bytes of these can ask for gigabytes or for hours: text that is encoded again and
again, a thousand copies of one list, a key that takes forever to hash, tensors of any stated size.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Iterable, Sequence
from typing import Any

# Lists, tuples, calls and so on, each of which takes a hundred times the memory of its instruction.
# A file of DiT-XL/2 has 4,000; a training checkpoint with averages and optimizer has 20,000. More
# are allowed in a larger file, at LEAST_OBJECT_BYTES each, as in a long log.
MOST_OBJECTS, LEAST_OBJECT_BYTES = 300_000, 8
# Keys that can be slow to hash, or have the same hash as others: tuples and fractions.
MOST_SLOW_KEYS, MOST_KEY_ITEMS, MOST_KEY_LEVELS = 10_000, 8, 3
MOST_DIMENSIONS = 64
_SLACK = 1000

# Bytes of an element; types that are not listed have one.
_BYTES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2,
          "ComplexFloat": 8, "ComplexDouble": 16, "QInt32": 4}  # fmt: skip

_LITERALS = {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
             "BINUNICODE", "SHORT_BINSTRING"}  # fmt: skip
_VIEWS = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
_WITH_STATE = "torch._utils._rebuild_parameter_with_state"
_OF_TYPE = "torch._tensor._rebuild_from_type_v2"
_TORCH = {*_VIEWS, _OF_TYPE, _WITH_STATE, "torch._utils._rebuild_parameter",
          "torch.nn.parameter.Parameter", "torch.Size", "torch.device"}  # fmt: skip
_USUAL = ("torch", "collections", "builtins", "__builtin__", "_codecs", "argparse")


class Refused(Exception):
    """The reason why an intact file is refused."""


class _Name(str):
    """The full name of a function or class that the pickle asks for."""


class _Elements(int):
    """A storage or a tensor: the number of elements that it claims."""


class _Made:
    """A list with its items, or another object that has only a size (``more``)."""

    __slots__ = ("items", "more")

    def __init__(self, size: int = 0) -> None:
        self.items: list[Any] = []
        self.more = size

    def __len__(self) -> int:
        return len(self.items) + self.more


class Pickle:
    """Executes one pickle, of at most ``pickle_bytes`` bytes, on sizes only. It counts the objects
    that are made, the bytes of storages, the items and characters that calls copy, and slow keys.
    """

    def __init__(self, source: Any, file_bytes: int, pickle_bytes: int) -> None:
        self.file_bytes = file_bytes
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[Any, Any] = {}
        self.names: list[_Name] = []
        self.storages: dict[Any, int] = {}
        self.made, self.stored, self.copied, self.slow_keys = 0, 0, 0, 0
        most = max(MOST_OBJECTS, pickle_bytes // LEAST_OBJECT_BYTES)
        for opcode, value, position in pickletools.genops(source):
            self.step(opcode.name, ord(opcode.code), value)
            if self.made > most:
                raise Refused(f"its pickle makes more than {most} objects")
            if self.copied > 4 * (position or 0) + _SLACK:
                raise Refused("its pickle copies more than it holds")

    def step(self, name: str, code: int, value: Any) -> None:
        stack = self.stack
        match name:
            case "BINPUT" | "LONG_BINPUT":
                self.memo[value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[value])
            case "MARK":
                self.made += 1
                self.marks.append(stack)
                self.stack = []
            case "TUPLE":
                items = self.marked()
                self.stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.made += 1
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                self.made += 1
                stack.append(_Made())
            case "BINPERSID":
                stack.append(self.storage(stack.pop()))
            case "GLOBAL":
                self.names.append(_Name(value.replace(" ", ".")))
                stack.append(self.names[-1])
            case "REDUCE" | "NEWOBJ":
                self.made += 1
                arguments = stack.pop()
                stack[-1] = self.call(stack[-1], arguments)
            case "BUILD":
                state = stack.pop()
                self.copied += _size(state)
                self.check_keys(map(_first, _items(state)))
            case "APPEND":
                item = stack.pop()
                stack[-1].items.append(item)
            case "APPENDS":
                items = self.marked()
                self.stack[-1].items.extend(items)
            case "SETITEM":
                _, key = stack.pop(), stack.pop()
                self.set_keys([key])
            case "SETITEMS":
                self.set_keys(self.marked()[::2])
            case "PROTO" | "STOP":
                pass
            case _ if name in _LITERALS:
                stack.append(value)
            case _:
                raise ValueError(f"Unsupported operand {code}")

    def marked(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def set_keys(self, keys: list[Any]) -> None:
        self.check_keys(keys)
        self.stack[-1].more += len(keys)

    def check_keys(self, keys: Iterable[Any]) -> None:
        for key in keys:
            if isinstance(key, int) and not isinstance(key, _Elements) and abs(key) >= 2**60:
                raise Refused("its pickle has a whole number of more than 60 bits as a key")
            if not isinstance(key, str | int | None):
                _check_slow_key(key)
                self.slow_keys += 1
        if self.slow_keys > MOST_SLOW_KEYS:
            raise Refused(f"its pickle has more than {MOST_SLOW_KEYS} keys that are slow to hash")

    def storage(self, identity: Any) -> _Elements:
        kind, key, _, elements, *view = identity[1:]
        if not isinstance(elements, int) or elements < 0:
            raise ValueError("a storage without a size")
        # torch hashes and prints these.
        keys = (key, *(item for each in view for item in _items(each)))
        if not isinstance(kind, _Name) or not all(isinstance(k, str | int) for k in keys):
            raise ValueError("a storage without a name")
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
            raise Refused(f"the pickle asks for {asked!r}; only dense tensors are loaded")
        if function in (_OF_TYPE, _WITH_STATE):
            state = arguments[3]
            if isinstance(state, tuple) and len(state) != 2:  # torch prints it
                raise ValueError("attributes that are not a dict")
        if function == _OF_TYPE:
            return self.call(arguments[0], arguments[2])
        short = function.rpartition(".")[2]
        if short in ("encode", "bytearray") and arguments:
            latin = arguments[1:] in ((), ("latin1",), ("latin-1",))
            if not latin or not isinstance(arguments[0], str | _Made):
                raise Refused(f"the pickle makes bytes by {str(function)!r} of other than latin1")
        self.copied += sum(map(_size, arguments))
        # Not a list, because the arguments may be one list many times.
        items = (item for argument in arguments for item in _items(argument))
        if short in ("set", "Counter"):
            self.check_keys(items)
        elif short == "OrderedDict":
            self.check_keys(map(_first, items))
        elif function == "torch.Size":
            return tuple(_items(arguments[0]))
        elif function in _VIEWS:
            sizes = _items(arguments[2])
            if len(sizes) > MOST_DIMENSIONS or not all(isinstance(n, int) for n in sizes):
                raise ValueError("a tensor without a shape")
            return _Elements(abs(math.prod(sizes)))
        return _Made(sum(map(_size, arguments)))


def _size(value: Any) -> int:
    if isinstance(value, tuple):
        return len(value) + sum(len(item) for item in value if isinstance(item, _Made))
    return len(value) if isinstance(value, str | _Made) else 1


def _items(value: Any) -> Sequence[Any]:
    return value.items if isinstance(value, _Made) else value if isinstance(value, tuple) else ()


def _first(pair: Any) -> Any:
    return next(iter(_items(pair)), None)


def _check_slow_key(key: Any, level: int = 1) -> None:
    """Refuse a key that is slow to hash for its length, such as a tuple of a tuple twice, of …"""
    if isinstance(key, tuple):
        if level > MOST_KEY_LEVELS or len(key) > MOST_KEY_ITEMS:
            raise Refused("its pickle has a large tuple as a key")
        for item in key:
            _check_slow_key(item, level + 1)
