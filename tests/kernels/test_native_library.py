"""Finding, loading and refusing the native library, and the runtime that it shares."""

from __future__ import annotations

import ctypes
import hashlib
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

from dit_kernels.cpu import loader as native_library
from dit_kernels.cpu import operators as native
from dit_kernels.dispatch import Unavailable

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
HEADER = KERNELS / "dit_kernels/cpu/interface.h"
NATIVE = "from dit_kernels.cpu import operators as native"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or COMPILER is None,
    reason="native kernels need Linux on x86-64 and a compiler",
)


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


@needs_compiler
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
    done = run(NATIVE + "; print(native.isa())", DIT_KERNELS_ISA=isa)
    assert done.stdout.strip() == isa, done.stderr


@needs_library
def test_an_unknown_instruction_set_is_refused() -> None:
    done = run(NATIVE + "; native.why_not()", DIT_KERNELS_ISA="sse9")
    assert done.returncode != 0
    assert "ValueError: DIT_KERNELS_ISA 'sse9': this machine has avx2" in done.stderr


def test_a_library_that_is_no_file_is_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing.so")
    done = run(
        NATIVE + "; native.why_not()",
        DIT_KERNELS_LIBRARY=missing,
    )
    assert f"ValueError: DIT_KERNELS_LIBRARY {missing!r} is not a file" in done.stderr


@needs_library
def test_the_library_carries_the_hash_of_the_interface() -> None:
    library = ctypes.CDLL(str(native_library.path()))
    library.dit_interface.restype = ctypes.c_char_p
    assert library.dit_interface().decode() == hashlib.sha256(HEADER.read_bytes()).hexdigest()


CHANGES = {
    "a type": ("int64_t count, int dtype", "int count, int dtype"),
    "an argument more": ("int64_t count, int dtype", "int64_t count, float limit, int dtype"),
    "two arguments exchanged": ("void* shift, const void* scale", "void* scale, const void* shift"),
    "an instruction set": ("avx2 = 1, avx512 = 2", "avx2 = 1, avx10 = 2, avx512 = 2"),
}


@needs_library
@pytest.mark.parametrize("change", CHANGES)
def test_a_library_of_another_interface_is_refused(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an update of the sources that nobody built again."""
    monkeypatch.setattr(native_library, "INTERFACE", edited(tmp_path, *CHANGES[change]))
    native_library.load.cache_clear()
    try:
        library, reason = native_library.load()
        assert library is None and not native.available()
        file = native_library.path()
        assert reason.startswith(f"{file} was built from other sources than this dit_kernels: ")
        assert "pip install" in reason and "\n" not in reason
    finally:
        native_library.load.cache_clear()


def edited(folder: Path, before: str, after: str) -> Path:
    text = HEADER.read_text()
    assert before in text
    (folder / HEADER.name).write_text(text.replace(before, after, 1))
    return folder / HEADER.name


@needs_compiler
@pytest.mark.parametrize("change", ["a type", "an argument more", None])
def test_definitions_that_differ_from_the_interface_do_not_compile(
    change: str | None, tmp_path: Path
) -> None:
    assert COMPILER is not None
    edited(tmp_path, *(CHANGES[change] if change else ("", "")))
    source = KERNELS / "csrc/cpu/rows/gelu.cpp"
    flags = ["-std=c++17", "-fsyntax-only", "-Werror=missing-declarations"]
    command = [COMPILER, *flags, "-I", str(tmp_path), "-I", str(KERNELS / "csrc/cpu"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (change is None), done.stderr
    assert change is None or "dit_gelu" in done.stderr


def test_prototypes_are_read_from_the_interface() -> None:
    found = native_library.prototypes()
    assert found["dit_gelu"] == ("int", "ppqii")
    assert found["dit_attention"] == ("int", "ppqqqqii")
    assert found["dit_groupnorm_silu"] == ("int", "ppppqqqqfiiii")
    assert found["dit_packed_bytes"] == ("int64_t", "qqi")
    assert found["dit_interface"] == ("const char*", "")
    assert len(found) == HEADER.read_text().count("\nDIT_API ")


def test_a_library_that_does_not_tell_its_interface_is_refused(tmp_path: Path) -> None:
    library = compiled('extern "C" int dit_kernels_abi_version() { return 1; }', tmp_path)
    code = NATIVE + "; print(native.available()); print(native.why_not())"
    done = run(code, DIT_KERNELS_LIBRARY=str(library))
    available, reason = done.stdout.splitlines()
    assert available == "False"
    assert reason.startswith(f"{library} was built from other sources than this dit_kernels: ")


def test_a_library_that_lacks_functions_is_refused(tmp_path: Path) -> None:
    told = native_library.interface_hash()
    source = f'extern "C" const char* dit_interface() {{ return "{told}"; }}'
    library = compiled(source, tmp_path)
    code = NATIVE + "; print(native.why_not())"
    done = run(code, DIT_KERNELS_LIBRARY=str(library))
    assert "cannot be loaded" in done.stdout and "dit_isa" in done.stdout


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("not a library")
    code = NATIVE + "; print(native.why_not())"
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
def test_the_library_brings_no_openmp() -> None:
    """Whose threads would wait at every barrier for one that the system is not running."""
    code = f"""
import ctypes
ctypes.CDLL({str(native_library.path())!r})
with open("/proc/self/maps") as maps:
    print(*{{line.split()[-1] for line in maps if "omp" in line}})
"""
    assert run(code).stdout.strip() == ""


@needs_library
def test_only_the_c_interface_is_exported() -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    command = [nm, "-D", "--defined-only", str(native_library.path())]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in listed.splitlines()}
    assert set(native_library.prototypes()) <= names
    assert {
        name for name in names if not name.startswith(("dit_", "__asan", "__odr_asan"))
    } == set()


def test_importing_loads_nothing() -> None:
    code = """
import sys
from dit_kernels.cpu import operators as native
from dit_kernels.cpu import loader as native_library
print(native_library.load.cache_info().currsize)
"""
    assert run(code).stdout.strip() == "0"
