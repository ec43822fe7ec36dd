"""The AMX attention on tile registers emulated in C++, on machines that lack AMX.

attention_tiles_emulated.h says what that proves and what it does not. On a machine with AMX,
test_native_operators.py runs the same code on real tiles.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import cases
import pytest
import torch
from numerics import assert_close_to_reference
from torch import Tensor

from dit_kernels import reference

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
# Of the file, less AMX: the vector half runs on the machine itself.
FLAGS = [
    *("-std=c++17", "-O2", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno"),
    *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    *("-mavx512vnni", "-mavx512bf16", "-DDIT_EMULATED_TILES"),
    *("-I", str(KERNELS / "dit_kernels/cpu"), "-I", str(KERNELS / "csrc/cpu")),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    info = Path("/proc/cpuinfo")
    if not info.is_file() or "avx512_bf16" not in info.read_text().split():
        pytest.skip("this machine lacks AVX512-BF16, which the emulated code needs beside tiles")
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("emulation") / "amx_emulation.so"
    source = Path(__file__).with_name("amx_emulation.cpp")
    # make asan sets both: the flags are for this library, the preloaded sanitizer is not for g++.
    more = shlex.split(os.environ.get("CXXFLAGS", ""))
    own = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    command = [compiler, *FLAGS, *more, str(source), "-o", str(library)]
    subprocess.run(command, env=own, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.emulated_attention.argtypes = [
        *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 4, ctypes.c_int,
    ]  # fmt: skip
    return loaded


def attend(library: ctypes.CDLL, qkv: Tensor, heads: int, threads: int = 1) -> Tensor:
    n, t, width = qkv.shape
    out = torch.empty(n, t, width // 3, dtype=qkv.dtype)
    call = (qkv.data_ptr(), out.data_ptr(), n, t, heads, width // 3 // heads, threads)
    assert library.emulated_attention(*call) == 0
    return out


def test_every_case_against_float64(emulated: ctypes.CDLL) -> None:
    for case in cases.CASES["attention"](torch.bfloat16):
        qkv, heads = case.arguments
        exact, same_dtype = (
            reference.attention(qkv.double(), heads),
            reference.attention(qkv, heads),
        )
        actual = attend(emulated, qkv, heads)
        assert_close_to_reference(actual, exact, same_dtype=same_dtype)


def test_every_thread_configures_its_tiles(emulated: ctypes.CDLL) -> None:
    # The emulation aborts where the processor would raise an illegal instruction.
    qkv = cases.qkv_of(3, 70, 2, 72, torch.bfloat16)
    results = [attend(emulated, qkv, 2, threads) for threads in (1, 2, 5)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_values_that_are_not_finite(emulated: ctypes.CDLL) -> None:
    cases.check_special(lambda *qkv: attend(emulated, *qkv), "attention", torch.bfloat16)
