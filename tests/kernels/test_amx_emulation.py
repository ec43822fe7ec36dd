"""The AMX attention on tile registers emulated in C++, on machines that lack AMX.

attention_tiles_emulated.h says what that proves and what not. On a machine with AMX,
test_native_attention.py runs the same code on its tiles.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from numerics import assert_close_to_reference
from torch import Tensor

from dit_kernels import reference

HEADS = 2
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
    more = shlex.split(os.environ.get("CXXFLAGS", ""))  # the sanitizers of make asan,
    own = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # which are not for g++ itself
    command = [compiler, *FLAGS, *more, str(source), "-o", str(library)]
    subprocess.run(command, env=own, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.emulated_attention.argtypes = [
        *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 4, ctypes.c_int,
    ]  # fmt: skip
    return loaded


def projection(n: int, t: int, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * d + t + seed)
    return torch.randn(n, t, 3 * HEADS * d, generator=generator).bfloat16()


def attend(library: ctypes.CDLL, qkv: Tensor, threads: int = 1) -> Tensor:
    n, t, width = qkv.shape
    out = torch.empty(n, t, width // 3, dtype=qkv.dtype)
    d = width // 3 // HEADS
    call = (qkv.data_ptr(), out.data_ptr(), n, t, HEADS, d, threads)
    assert library.emulated_attention(*call) == 0
    return out


@pytest.mark.parametrize("d", [8, 24, 32, 48, 64, 72, 96, 128])
def test_float64(emulated: ctypes.CDLL, d: int) -> None:
    for t in (1, 5, 16, 37, 256, 300):
        qkv = projection(1, t, d)
        exact, same_dtype = reference.attention(qkv.double(), 2), reference.attention(qkv, 2)
        assert_close_to_reference(attend(emulated, qkv), exact, same_dtype=same_dtype)


@pytest.mark.parametrize("t", [520, 700])
def test_blocks_of_keys_with_a_moving_maximum(emulated: ctypes.CDLL, t: int) -> None:
    qkv = projection(1, t, 72)
    k = qkv.view(t, 3, HEADS, 72)[:, 1]
    k.copy_((k.float() * torch.linspace(0.1, 4, t).view(t, 1, 1)).bfloat16())
    exact, same_dtype = reference.attention(qkv.double(), 2), reference.attention(qkv, 2)
    assert_close_to_reference(attend(emulated, qkv), exact, same_dtype=same_dtype)


def test_every_thread_configures_its_tiles(emulated: ctypes.CDLL) -> None:
    # The emulation aborts where the processor would raise an illegal instruction.
    qkv = projection(3, 70, 72)
    results = [attend(emulated, qkv, threads) for threads in (1, 2, 5)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_nan_and_infinity(emulated: ctypes.CDLL, which: int, value: float) -> None:
    qkv = projection(1, 37, 72)
    qkv.view(37, 3, HEADS, 72)[20, which, 0, 3] = value
    actual, expected = attend(emulated, qkv), reference.attention(qkv, HEADS)
    assert not expected.isfinite().all()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
