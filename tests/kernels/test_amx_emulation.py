"""The AMX attention on tile registers emulated in C++, on machines that lack AMX.

amx_emulation.cpp says what that proves and what it does not. On a machine with AMX,
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
from torch import Tensor

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
# Of the file, less AMX: the vector half runs on the machine itself.
FLAGS = (
    "-std=c++17 -O2 -shared -fPIC -pthread -ffp-contract=off -fno-math-errno -mavx2 -mfma -mf16c "
    "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512bf16"
)


@pytest.mark.slow
def test_every_case_against_float64_and_the_same_bits_on_any_threads(tmp_path: Path) -> None:
    info = Path("/proc/cpuinfo")
    if not info.is_file() or "avx512_bf16" not in info.read_text().split():
        pytest.skip("this machine lacks AVX512-BF16, which the emulated code needs beside tiles")
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler")
    file, source = tmp_path / "amx_emulation.so", Path(__file__).with_name("amx_emulation.cpp")
    # make asan sets both: the flags are for this library, the preloaded sanitizer is not for g++.
    more = shlex.split(os.environ.get("CXXFLAGS", ""))
    own = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    folders = ["-I", str(KERNELS / "dit_kernels/cpu"), "-I", str(KERNELS / "csrc/cpu")]
    command = [compiler, *FLAGS.split(), *folders, *more, str(source), "-o", str(file)]
    subprocess.run(command, env=own, check=True)
    attention = ctypes.CDLL(str(file)).emulated_attention
    attention.argtypes = [*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 4, ctypes.c_int]

    def attend(qkv: Tensor, heads: int, threads: int = 1) -> Tensor:
        n, t, width = qkv.shape
        out = torch.empty(n, t, width // 3, dtype=qkv.dtype)
        d = width // 3 // heads
        assert attention(qkv.data_ptr(), out.data_ptr(), n, t, heads, d, threads) == 0
        return out

    cases.check(attend, "attention", torch.bfloat16)
    cases.check_special(attend, "attention", torch.bfloat16)
    # Every thread configures its tiles: the emulation aborts where the processor would raise #UD.
    qkv = cases.qkv_of(3, 70, 2, 72, torch.bfloat16)
    results = [attend(qkv, 2, threads) for threads in (1, 2, 5)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
