"""Finding, loading and refusing libdit_kernels_cpu (kernels/csrc/cpu), with ctypes.

    DIT_KERNELS_LIBRARY  another path of the library
    DIT_KERNELS_ISA      a lower instruction set than the machine's: avx2, avx512, avx512_bf16, amx

Both are read once, when the library is first asked for.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch  # first: the library then shares the OpenMP runtime that torch brings

ABI_VERSION = 1
LIBRARY = "libdit_kernels_cpu.so"
ISAS = ("none", "avx2", "avx512", "avx512_bf16", "amx")  # kernels/csrc/cpu/isa.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INT32 = 3

# Arguments of each function: p pointer, q int64_t, i int, f float.
SIGNATURES = {
    "dit_layernorm_modulate": "pppp qqq qq f iii i",
    "dit_layernorm_modulate_quantize": "ppppp qqq qq f iii i i",
    "dit_gate_residual": "pppp qqq q ii i",
    "dit_gate_residual_layernorm_modulate": "ppppppp qqq qqq f iiii i",
    "dit_gate_residual_layernorm_modulate_quantize": "pppppppp qqq qqq f iiii i i",
    "dit_gelu": "pp q i i",
    "dit_bias_gelu": "ppp qq iii i",
    "dit_quantize_rows": "ppp qq i i i",
    "dit_gelu_quantize": "pppp qq ii i i",
    "dit_dequantize_rows": "pppppp qq iii i i",
    "dit_groupnorm_silu": "pppp qqqq f iii i",
    "dit_guided_step": "pppppppp qqqqqqq i i",
    "dit_attention": "pp qqqq i i",
    "dit_packed_bytes": "qqi",
    "dit_pack_weight": "pp qqi i",
    "dit_linear": "pppp qqq i i i",
    "dit_linear_int8": "pppppp qqq i i i",
}
TYPES = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}

# kernels/csrc/cpu/api.h
ERRORS = {
    -1: "a null pointer",
    -2: "a size that is negative, zero where it may not be, too great or does not divide",
    -3: "a dtype that it does not take",
    -4: "a number of threads below 1",
    -5: "a tensor whose address is no multiple of its element size",
    -6: "a processor without the instructions that it needs (see dit_kernels.native.isa)",
    -7: "a negative or too great stride",
    -8: "more memory than there is",
}


def path() -> Path:
    """Where the library is looked for."""
    named = os.environ.get("DIT_KERNELS_LIBRARY")
    if named and not Path(named).is_file():
        raise ValueError(f"DIT_KERNELS_LIBRARY {named!r} is not a file")
    return Path(named) if named else Path(__file__).with_name(LIBRARY)


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """(The library, ""), or (None, why it cannot be used).

    Raises:
        ValueError: an environment variable names no file, or no instruction set of this machine.
    """
    file = path()
    if not file.is_file():
        return None, (
            f"{LIBRARY} is not built: on Linux and x86-64, with g++ and CMake, "
            "`pip install .` in the sources builds it"
        )
    try:
        library = ctypes.CDLL(str(file))
        version = library.dit_kernels_abi_version()
        if version != ABI_VERSION:
            return None, (
                f"{file} has ABI version {version}, this dit_kernels needs {ABI_VERSION}: "
                "`pip install .` in the sources builds it again"
            )
        for name, letters in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = [TYPES[letter] for letter in letters if letter != " "]
        library.dit_packed_bytes.restype = ctypes.c_int64
    except (OSError, AttributeError) as error:
        return None, f"{file} cannot be loaded: {error}"
    _lower_isa(library)
    if library.dit_isa() == 0:
        return None, "this processor lacks AVX2, FMA or F16C"
    return library, ""


def _lower_isa(library: ctypes.CDLL) -> None:
    named = os.environ.get("DIT_KERNELS_ISA")
    if not named:
        return
    possible = ISAS[1 : library.dit_isa() + 1]
    if named not in possible:
        raise ValueError(f"DIT_KERNELS_ISA {named!r}: this machine has {', '.join(possible)}")
    library.dit_set_isa(ISAS.index(named))
