"""Finding, loading and refusing the native library, and what is in it."""

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


def compiled(source: str, folder: Path) -> Path:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    library = folder / loader.LIBRARY
    (folder / "fake.cpp").write_text(source)
    command = [COMPILER, "-shared", "-fPIC", "-o", str(library), str(folder / "fake.cpp")]
    subprocess.run(command, check=True)
    return library


@needs_compiler
def test_the_library_is_there_where_it_can_be_built() -> None:
    assert native.why_not() is None, WHY_NOT
    assert native.available() and native.isa() in LEVELS


@needs_library
def test_levels_are_those_of_the_processor() -> None:
    flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text().split("flags", 1)[1]))
    assert ("avx512" in LEVELS) == ({"avx512f", "avx512bw", "avx512_vnni"} <= flags)
    assert ("avx512_bf16" in LEVELS) == ({"avx512_bf16", "avx512_vnni"} <= flags)
    assert ("amx" in LEVELS) == ({"amx_tile", "amx_bf16", "amx_int8"} <= flags)


@needs_library
def test_the_library_carries_the_hash_of_the_interface() -> None:
    library = ctypes.CDLL(str(loader.path()))
    library.dit_interface.restype = ctypes.c_char_p
    assert library.dit_interface().decode() == hashlib.sha256(HEADER.read_bytes()).hexdigest()


@needs_library
def test_importing_loads_nothing_and_a_lower_instruction_set_can_be_asked_for() -> None:
    code = """
from dit_kernels.cpu import loader, operators
print(loader.load.cache_info().currsize, operators.isa())
"""
    environment = os.environ | {"DIT_KERNELS_ISA": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["0", "avx2"], done.stderr


@needs_library
def test_the_library_brings_no_openmp() -> None:
    """Whose threads would wait at every barrier for one that the system is not running."""
    code = f"""
import ctypes
ctypes.CDLL({str(loader.path())!r})
with open("/proc/self/maps") as maps:
    print(*{{line.split()[-1] for line in maps if "omp" in line}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@needs_library
def test_only_the_c_interface_is_exported() -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    command = [nm, "-D", "--defined-only", str(loader.path())]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in listed.splitlines()}
    assert set(loader.prototypes()) <= names
    assert all(name.startswith(("dit_", "__asan", "__odr_asan")) for name in names)


def test_prototypes_are_read_from_the_interface() -> None:
    found = loader.prototypes()
    assert found["dit_attention"] == ("int", "ppqqqqii")
    assert found["dit_groupnorm_silu"] == ("int", "ppppqqqqfiii")
    assert found["dit_packed_bytes"] == ("int64_t", "qqi")
    assert found["dit_interface"] == ("const char*", "")
    assert len(found) == HEADER.read_text().count("\nDIT_API ")


CHANGES = {
    "a type": ("int64_t count, int dtype", "int count, int dtype"),
    "an argument more": ("int64_t count, int dtype", "int64_t count, float limit, int dtype"),
    "two arguments exchanged": ("void* shift, const void* scale", "void* scale, const void* shift"),
    "an instruction set": ("avx2 = 1, avx512 = 2", "avx2 = 1, avx10 = 2, avx512 = 2"),
    "nothing": ("", ""),
}


def edited(folder: Path, change: str) -> Path:
    before, after = CHANGES[change]
    text = HEADER.read_text()
    assert before in text
    (folder / HEADER.name).write_text(text.replace(before, after, 1))
    return folder / HEADER.name


@needs_library
@pytest.mark.parametrize("change", CHANGES)
def test_a_library_of_another_interface_is_refused(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unloaded: None
) -> None:
    """As after an update of the sources that nobody built again."""
    monkeypatch.setattr(loader, "INTERFACE", edited(tmp_path, change))
    library, reason = loader.load()
    assert (library is None) == (change != "nothing") != native.available()
    if change != "nothing":
        built = f"{loader.path()} was built from other sources than this dit_kernels: "
        assert reason.startswith(built) and "pip install" in reason and "\n" not in reason


@needs_compiler
@pytest.mark.parametrize("change", ["a type", "an argument more", "nothing"])
def test_definitions_that_differ_from_the_interface_do_not_compile(
    change: str, tmp_path: Path
) -> None:
    assert COMPILER is not None
    edited(tmp_path, change)
    flags = ["-std=c++17", "-fsyntax-only", "-Werror=missing-declarations", "-I", str(tmp_path)]
    sources = KERNELS / "csrc/cpu"
    command = [COMPILER, *flags, "-I", str(sources), str(sources / "rows/gelu.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (change == "nothing"), done.stderr
    assert change == "nothing" or "dit_gelu" in done.stderr


def test_a_file_that_is_not_this_library_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unloaded: None
) -> None:
    told = f'extern "C" const char* dit_interface() {{ return "{loader.interface_hash()}"; }}'
    (tmp_path / "silent").mkdir()
    (tmp_path / "text.so").write_text("not a library")
    silent = compiled('extern "C" int dit_kernels_abi_version() { return 1; }', tmp_path / "silent")
    for file, message in (
        (silent, f"^{silent} was built from other sources than this dit_kernels: "),
        (compiled(told, tmp_path), "cannot be loaded.*dit_isa"),  # it lacks functions
        (tmp_path / "text.so", "cannot be loaded"),
    ):
        monkeypatch.setenv("DIT_KERNELS_LIBRARY", str(file))
        loader.load.cache_clear()
        assert not native.available() and re.search(message, native.why_not() or "")


def test_environment_variables_that_name_nothing_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unloaded: None
) -> None:
    if native.available():
        loader.load.cache_clear()
        monkeypatch.setenv("DIT_KERNELS_ISA", "sse9")
        with pytest.raises(ValueError, match=r"^DIT_KERNELS_ISA 'sse9': this machine has avx2"):
            native.why_not()
    monkeypatch.setenv("DIT_KERNELS_LIBRARY", str(tmp_path / "nothing.so"))
    with pytest.raises(ValueError, match=r"^DIT_KERNELS_LIBRARY '.*nothing.so' is not a file$"):
        native.why_not()


def test_without_a_library_a_call_says_why_or_how_to_build_it(
    monkeypatch: pytest.MonkeyPatch, unloaded: None, tmp_path: Path
) -> None:
    monkeypatch.delenv("DIT_KERNELS_LIBRARY", raising=False)
    monkeypatch.setattr(loader, "LIBRARY", "libnothing.so")
    for call in (lambda: native.gelu(torch.zeros(3)), native.isa):
        with pytest.raises(Unavailable, match=r"libnothing\.so is not built.*pip install"):
            call()
    loader.load.cache_clear()
    (tmp_path / loader.NOT_BUILT).write_text("there is no cmake\n")
    monkeypatch.setattr(loader, "path", lambda: tmp_path / "libnothing.so")
    with pytest.raises(Unavailable, match=r"was not built .*: there is no cmake$"):
        native.isa()
