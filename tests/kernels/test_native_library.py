"""Finding, loading and refusing the native library, and the runtime that it shares."""

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

from dit_kernels import native, native_library
from dit_kernels.choose import Unavailable

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(KERNELS), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def compiled(source: str, folder: Path) -> Path:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    library = folder / native_library.LIBRARY
    (folder / "fake.cpp").write_text(source)
    command = [COMPILER, "-shared", "-fPIC", "-o", str(library), str(folder / "fake.cpp")]
    subprocess.run(command, check=True)
    return library


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or COMPILER is None,
    reason="native kernels need Linux on x86-64 and a compiler",
)
def test_the_library_is_there_where_it_can_be_built() -> None:
    assert native.why_not() is None, WHY_NOT
    assert native.available()
    assert native.isa() in LEVELS


@needs_library
def test_levels_are_those_of_the_processor() -> None:
    flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text().split("flags", 1)[1]))
    assert ("avx512" in LEVELS) == ({"avx512f", "avx512bw", "avx512_vnni"} <= flags)
    assert ("avx512_bf16" in LEVELS) == ({"avx512_bf16", "avx512_vnni"} <= flags)
    assert ("amx" in LEVELS) == ({"amx_tile", "amx_bf16", "amx_int8"} <= flags)


@needs_library
@pytest.mark.parametrize("isa", LEVELS)
def test_a_lower_instruction_set_on_request(isa: str) -> None:
    done = run("from dit_kernels import native; print(native.isa())", DIT_KERNELS_ISA=isa)
    assert done.stdout.strip() == isa, done.stderr


@needs_library
def test_an_unknown_instruction_set_is_refused() -> None:
    done = run("from dit_kernels import native; native.why_not()", DIT_KERNELS_ISA="sse9")
    assert done.returncode != 0
    assert "ValueError: DIT_KERNELS_ISA 'sse9': this machine has avx2" in done.stderr


def test_a_library_that_is_no_file_is_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing.so")
    done = run("from dit_kernels import native; native.why_not()", DIT_KERNELS_LIBRARY=missing)
    assert f"ValueError: DIT_KERNELS_LIBRARY {missing!r} is not a file" in done.stderr


def test_a_library_of_another_version_is_refused(tmp_path: Path) -> None:
    library = compiled('extern "C" int dit_kernels_abi_version() { return 7; }', tmp_path)
    code = "from dit_kernels import native; print(native.available()); print(native.why_not())"
    done = run(code, DIT_KERNELS_LIBRARY=str(library))
    available, reason = done.stdout.splitlines()
    assert available == "False"
    wanted = native_library.ABI_VERSION
    assert reason.startswith(f"{library} has ABI version 7, this dit_kernels needs {wanted}: ")
    assert "pip install" in reason


def test_a_library_that_lacks_functions_is_refused(tmp_path: Path) -> None:
    source = f'extern "C" int dit_kernels_abi_version() {{ return {native_library.ABI_VERSION}; }}'
    library = compiled(source, tmp_path)
    code = "from dit_kernels import native; print(native.why_not())"
    done = run(code, DIT_KERNELS_LIBRARY=str(library))
    assert "cannot be loaded" in done.stdout and "dit_layernorm_modulate" in done.stdout


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("not a library")
    code = "from dit_kernels import native; print(native.why_not())"
    done = run(code, DIT_KERNELS_LIBRARY=str(tmp_path / "text.so"))
    assert "cannot be loaded" in done.stdout, done.stderr


def test_without_a_library_a_call_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIT_KERNELS_LIBRARY", raising=False)
    monkeypatch.setattr(native_library, "LIBRARY", "libnothing.so")
    native_library.load.cache_clear()
    try:
        assert not native.available()
        for call in (lambda: native.gelu(torch.zeros(3)), native.isa):
            with pytest.raises(Unavailable, match=r"libnothing\.so is not built.*pip install"):
                call()
    finally:
        native_library.load.cache_clear()


@needs_library
def test_torch_and_the_library_share_one_openmp_runtime() -> None:
    code = """
from dit_kernels import native
import torch
torch.set_num_threads(2)
native.gelu(torch.zeros(1 << 16))
torch.zeros(1 << 20).exp()
with open("/proc/self/maps") as maps:
    paths = {line.split()[-1] for line in maps if "/" in line}
print(*sorted(p for p in paths if any(name in p for name in ("libgomp", "libomp", "libiomp"))))
"""
    done = run(code)
    assert len(done.stdout.split()) == 1, done.stdout + done.stderr


@needs_library
def test_only_the_c_interface_is_exported() -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    command = [nm, "-D", "--defined-only", str(native_library.path())]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in listed.splitlines()}
    asked = {"dit_kernels_abi_version", "dit_isa", "dit_set_isa", *native_library.SIGNATURES}
    assert asked <= names
    assert {
        name for name in names if not name.startswith(("dit_", "__asan", "__odr_asan"))
    } == set()


def test_importing_loads_nothing() -> None:
    code = """
import sys
from dit_kernels import native, native_library
print(native_library.load.cache_info().currsize)
"""
    assert run(code).stdout.strip() == "0"
