"""Find libdit_kernels_cpu (kernels/csrc/cpu), load it with ctypes, or say why it cannot be used.

Two environment variables are read once, when the library is first asked for:

    DIT_KERNELS_LIBRARY  another path of the library
    DIT_KERNELS_ISA      a lower instruction set than the machine's: avx2, avx512, avx512_bf16, amx
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
from pathlib import Path

import torch

from dit_kernels.checks import Unavailable

LIBRARY = "libdit_kernels_cpu.so"
NOT_BUILT = "libdit_kernels_cpu.txt"  # setup.py's reason why it could not build the library
INTERFACE = Path(__file__).with_name("interface.h")

# The next three repeat what interface.h says.
ISAS = ("none", "avx2", "avx512", "avx512_bf16", "amx")
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
ERRORS = {
    -1: "a null pointer",
    -2: "a size that is negative, zero where it may not be, too great or does not divide",
    -3: "a dtype that it does not take",
    -4: "a number of threads below 1",
    -5: "a tensor whose address is no multiple of its element size",
    -6: "a processor without the instructions that it needs (see dit_kernels.cpu.loader.isa)",
    -7: "a negative or too great stride",
    -8: "more memory than there is",
}

LETTERS = {"int64_t": "q", "int": "i", "float": "f"}
TYPES = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}
RESULTS = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "const char*": ctypes.c_char_p}
_PROTOTYPE = re.compile(r"^DIT_API ([\w ]+\*?) (\w+)\(([^)]*)\);", re.MULTILINE)


@functools.cache
def prototypes() -> dict[str, tuple[str, str]]:
    """Function → (its result's C type, its arguments: p pointer, q int64_t, i int, f float)."""
    found: dict[str, tuple[str, str]] = {}
    for result, name, listed in _PROTOTYPE.findall(INTERFACE.read_text(encoding="utf-8")):
        arguments = [] if listed == "void" else listed.split(",")
        letters = ("p" if "*" in a else LETTERS[a.split()[0]] for a in arguments)
        found[name] = (result, "".join(letters))
    return found


def interface_hash() -> str:
    """The SHA-256 of interface.h, which CMakeLists.txt compiles into the library."""
    return hashlib.sha256(INTERFACE.read_bytes()).hexdigest()


def path() -> Path:
    """Where the library should be."""
    named = os.environ.get("DIT_KERNELS_LIBRARY")
    if named and not Path(named).is_file():
        raise ValueError(f"DIT_KERNELS_LIBRARY {named!r} is not a file")
    return Path(named).absolute() if named else Path(__file__).with_name(LIBRARY)


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """(the library, ""), or (None, the reason why it cannot be used).

    Raises:
        ValueError: an environment variable names no file, or no instruction set of this machine.
    """
    file = path()
    if not file.is_file():
        note = file.with_name(NOT_BUILT)
        if note.is_file():
            reason = note.read_text(encoding="utf-8").strip()
            return None, f"{LIBRARY} was not built when this package was built: {reason}"
        return None, (
            f"{LIBRARY} is not built: on Linux and x86-64, with g++ and CMake, "
            "`pip install .` in the sources builds it"
        )
    try:
        library = ctypes.CDLL(str(file))
        library.dit_interface.restype = ctypes.c_char_p
        if library.dit_interface().decode() != interface_hash():
            return None, (
                f"{file} was built from other sources than this dit_kernels: `pip install .` in "
                "the sources builds it again"
            )
        for name, (result, letters) in prototypes().items():
            function = getattr(library, name)
            function.restype = RESULTS[result]
            function.argtypes = [TYPES[letter] for letter in letters]
    except (OSError, AttributeError) as error:
        return None, f"{file} cannot be loaded: {error}"
    if named := os.environ.get("DIT_KERNELS_ISA"):
        possible = ISAS[1 : library.dit_isa() + 1]
        if named not in possible:
            raise ValueError(f"DIT_KERNELS_ISA {named!r}: this machine has {', '.join(possible)}")
        library.dit_set_isa(ISAS.index(named))
    if library.dit_isa() == 0:
        return None, "this processor lacks AVX2, FMA or F16C"
    return library, ""


def loaded() -> ctypes.CDLL:
    """The library. Raises `Unavailable` if there is none."""
    library, reason = load()
    if library is None:
        raise Unavailable(reason)
    return library


def why_not() -> str | None:
    """Why the native operators cannot run on this machine, or None if they can."""
    return load()[1] or None


def available() -> bool:
    """Whether the native operators can run on this machine."""
    return load()[0] is not None


def isa() -> str:
    """The instruction set in use: "avx2", "avx512", "avx512_bf16" or "amx".

    Raises `Unavailable` if there is no library.
    """
    return ISAS[loaded().dit_isa()]
