"""Finding, loading and refusing the native library, and what is in it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native_levels import LEVELS, WHY_NOT, needs_library

from dit_kernels import Unavailable
from dit_kernels.cpu import loader
from dit_kernels.cpu import operators as native

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
HEADER = KERNELS / "dit_kernels/cpu/interface.h"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or COMPILER is None,
    reason="native kernels need Linux on x86-64 and a compiler",
)


@pytest.fixture
def unloaded():
    """The library is looked for again, now and after the test."""
    loader.load.cache_clear()
    yield
    loader.load.cache_clear()


@needs_compiler
def test_the_library_is_there_and_has_the_levels_of_the_processor() -> None:
    assert native.why_not() is None, WHY_NOT
    assert native.available() and native.isa() in LEVELS
    flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text().split("flags", 1)[1]))
    assert ("avx512" in LEVELS) == ({"avx512f", "avx512bw", "avx512_vnni"} <= flags)
    assert ("avx512_bf16" in LEVELS) == ({"avx512_bf16", "avx512_vnni"} <= flags)
    assert ("amx" in LEVELS) == ({"amx_tile", "amx_bf16", "amx_int8"} <= flags)


@pytest.mark.slow
@needs_library
def test_what_a_process_that_loads_it_gets() -> None:
    """Nothing at import; the instruction set asked for; no OpenMP beside torch's, whose threads
    would wait at every barrier for one that the system is not running."""
    code = """
import ctypes, os
ctypes.CDLL(os.environ["FILE"])
with open("/proc/self/maps") as maps:
    print(len({line.split()[-1] for line in maps if "omp" in line}))
from dit_kernels.cpu import loader, operators
print(loader.load.cache_info().currsize, operators.isa())
"""
    environment = os.environ | {"DIT_KERNELS_ISA": "avx2", "FILE": str(loader.path())}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["0", "0", "avx2"], done.stderr


@needs_library
def test_another_interface_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unloaded: None
) -> None:
    """As after an update of the sources that nobody built again."""
    (tmp_path / HEADER.name).write_text(HEADER.read_text() + "\n")
    monkeypatch.setattr(loader, "INTERFACE", tmp_path / HEADER.name)
    library, reason = loader.load()
    assert library is None and "\n" not in reason
    assert f"{loader.path()} was built from other sources than this dit_kernels: " in reason


def test_what_cannot_be_loaded_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unloaded: None
) -> None:
    def refused(expected: type[Exception], message: str) -> None:
        loader.load.cache_clear()
        with pytest.raises(expected, match=message):
            native.gelu(torch.zeros(3))

    if native.available():
        monkeypatch.setenv("DIT_KERNELS_ISA", "sse9")
        refused(ValueError, r"^DIT_KERNELS_ISA 'sse9': this machine has avx2")
    file = tmp_path / loader.LIBRARY
    monkeypatch.setenv("DIT_KERNELS_LIBRARY", str(file))
    refused(ValueError, r"^DIT_KERNELS_LIBRARY '.*' is not a file$")
    file.write_text("not a library")
    refused(Unavailable, "cannot be loaded")
    file.unlink()
    monkeypatch.setattr(loader, "path", lambda: file)
    refused(Unavailable, r"is not built.*pip install")
    (tmp_path / loader.NOT_BUILT).write_text("there is no cmake\n")
    refused(Unavailable, r"was not built .*: there is no cmake$")
