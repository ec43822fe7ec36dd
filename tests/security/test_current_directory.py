"""No module or program is run from a current directory that belongs to a stranger."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.cpu_vec_isa import VecISA

import dit_bench
import dit_engine
import dit_export
import dit_kernels
from dit_engine.backends import compile as compile_backend
from dit_engine.console.run import entry
from dit_engine.current_directory import (
    LEAVE_OUT,
    VARIABLE,
    leave_out,
    left_out_of_children,
    python,
)
from dit_engine.training import avatars
from dit_export.server import binary as server_binary

MODULES = (  # Python itself imports none of them before a module that `python -m` names
    "argparse", "ctypes", "dataclasses", "dit_engine", "dit_kernels", "json", "multiprocessing",
    "numpy", "pathlib", "PIL", "pickle", "platform", "queue", "shutil", "signal", "socket",
    "struct", "subprocess", "sysconfig", "tempfile", "threading", "torch", "tqdm", "typing",
)  # fmt: skip
PROGRAMS = ("nvidia-smi", "tritonserver", "g++", "gcc", "ld", "openssl")


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that gets a line for everything that is run from the stranger's current directory."""
    marks, folder = tmp_path / "marks", tmp_path / "stranger"
    folder.mkdir()
    marks.touch()
    for name in MODULES:
        text = f"open({str(marks)!r}, 'a').write('{name}.py\\n')\n"
        (folder / f"{name}.py").write_text(text)
    for name in PROGRAMS:
        (folder / name).write_text(f"#!/bin/sh\necho {name} >> '{marks}'\n")
        (folder / name).chmod(0o755)
    for variable in (VARIABLE, "PATH", "LD_LIBRARY_PATH", "PYTHONPATH"):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))  # restored afterwards
        if not os.environ[variable]:
            monkeypatch.delenv(variable)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(folder)
    return marks


def run_python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def test_programs_that_we_start(marks: Path, tmp_path: Path) -> None:
    """Programs that can import what this process can."""
    run_python("import struct")
    assert marks.read_text() == "struct.py\n"  # a program that is not protected
    marks.write_text("")
    with pytest.raises(FileNotFoundError, match="no Triton Inference Server"):
        server_binary._of_environment(Path(sys.executable))
    (tmp_path / "elsewhere.py").write_text("print('found')")
    sys.path[:] = ["", str(tmp_path), *sys.path]
    command = python("import struct, elsewhere, sys; print(sys.argv)", "--a")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["found", "['-c', '--a']"] and marks.read_text() == ""


def test_a_pool_of_processes(marks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with left_out_of_children(), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()
    assert marks.read_text() == "" and VARIABLE not in os.environ

    class Pool:
        _processes = None

        def __init__(self, **_: object) -> None: ...

        def map(self, *_: object) -> Any:
            run_python("import multiprocessing")
            raise OSError("no pool")

        def shutdown(self, **_: object) -> None: ...

    monkeypatch.setattr(avatars, "ProcessPoolExecutor", Pool)
    with pytest.raises(OSError, match="no pool"):
        avatars._render_all(0, 1, 8, "")
    assert marks.read_text() == ""


def test_blocks_of_several_threads(marks: Path) -> None:
    """The first to end leaves the others protected; what the program does meanwhile is no error."""
    first, second = left_out_of_children(), left_out_of_children()
    with ThreadPoolExecutor(1) as other:
        first.__enter__()
        other.submit(second.__enter__).result(10)
        first.__exit__(None, None, None)
        run_python("import struct")
        del os.environ[VARIABLE]
        other.submit(second.__exit__, None, None, None).result(10)
    assert VARIABLE not in os.environ and marks.read_text() == ""


def test_what_the_compiler_starts(marks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch starts its programs in the first call. Our package is used as a library here."""
    calls = []

    def standing_in(function: Any, **_: object) -> Any:
        def run(x: torch.Tensor) -> torch.Tensor:
            calls.append(os.environ.get(VARIABLE))
            if len(calls) == 1:  # when it compiles
                run_python("import struct, ctypes")
            return function(x)

        return run

    monkeypatch.setattr(torch, "compile", standing_in)
    monkeypatch.setattr(compile_backend, "use_private_cache", lambda: None)
    run = compile_backend.compile_graph(lambda x: x + 1)
    assert run(torch.zeros(1)) == 1 and marks.read_text() == ""
    assert run(torch.zeros(1)) == 1
    assert calls == ["1", None]  # as the program that uses the library has it


def test_what_the_compiler_asks_of_python_3_10(
    marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VecISA, "_avx_py_load", VecISA._avx_py_load)  # restored afterwards
    for _ in range(2):
        compile_backend._change_probe()
    code = VecISA._avx_py_load
    assert code.count(LEAVE_OUT) == 1 and code.endswith('cdll.LoadLibrary("__lib_path__")\n')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "__lib_path__" in done.stderr and marks.read_text() == ""


def test_a_command_runs_nothing_from_there(marks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, path = str(marks.parent / "stranger"), os.environ["PATH"]
    sys.path[:] = [here, "", *sys.path]
    for variable in ("PATH", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(variable, os.pathsep.join(["", "bin", ".", path, ""]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", str(marks.parent)]))
    leave_out()
    assert os.environ["PATH"] == os.environ["LD_LIBRARY_PATH"] == path
    assert os.environ["PYTHONPATH"] == str(marks.parent)
    assert not {here, ""} & set(sys.path)
    for program in PROGRAMS:
        assert Path(shutil.which(program) or "/").parent != Path(here)
    run_python("import struct")
    assert marks.read_text() == ""


def test_what_the_user_names_or_installed_there_stays(
    marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, library = str(marks.parent / "stranger"), str(Path(os.__file__).parent)
    with monkeypatch.context() as patch:
        # A file of site-packages (.pth) names a project that is installed for editing.
        patch.setattr(sys, "path", [here, library, "/packages", here])
        leave_out()
        assert sys.path == [library, "/packages", here]
    monkeypatch.setenv("PYTHONPATH", ".")
    sys.path.insert(0, here)
    leave_out()
    assert here in sys.path and os.environ["PYTHONPATH"] == "."
    monkeypatch.delenv("PYTHONPATH")
    ours = Path(compile_backend.__file__).parents[2]
    monkeypatch.chdir(ours)  # a checkout
    sys.path.insert(0, str(ours))
    leave_out()
    assert str(ours) in sys.path and here in sys.path


@pytest.mark.slow
def test_a_module_run_by_name(marks: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    Path("dit_engine.py").unlink()  # which Python itself would take for the package
    done = subprocess.run([sys.executable, "-m", "dit_bench", "--help"], env=kept, timeout=60,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("usage:"), done.stderr
    assert marks.read_text() == ""


def test_every_module_run_by_name_begins_alike() -> None:
    """A command lets threads sleep before it imports torch, too (`wait_briefly`)."""
    plain = {"client.py", "supervisor.py"}  # copied or run by path, beside nothing of a stranger's
    no_torch = {"cli", "documents"}  # the first imports torch late, the second computes nothing
    found = set()
    for package in (dit_engine, dit_kernels, dit_export, dit_bench):
        for path in Path(str(package.__file__)).parent.rglob("*.py"):
            text = path.read_text("utf-8")
            if '__name__ == "__main__"' not in text or path.name in plain:
                continue
            first = next(node for node in ast.parse(text).body if not is_header(node))
            assert isinstance(first, ast.If), f"{path} imports before it leaves the directory out"
            begins = [ast.unparse(node) for node in (first.test, *first.body)]
            assert begins[:3] == [
                "__name__ == '__main__'",
                "from dit_engine.first import leave_out_of_path",
                "leave_out_of_path()",
            ], path
            if "def main(" in text:
                assert "\n@entry\ndef main(" in text, path
                if package is dit_bench and path.stem not in no_torch:
                    assert begins[-1] == "wait_briefly()", path
            found.add(path.stem)
    assert {"__main__", "generate", "train"} <= found


def is_header(node: ast.stmt) -> bool:
    """The docstring, or the import of annotations."""
    return isinstance(node, ast.Expr) or (
        isinstance(node, ast.ImportFrom) and node.module == "__future__"
    )


def test_a_program_that_calls_a_command(marks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script or a notebook goes on with its own modules and its own environment."""
    here, seen = str(marks.parent / "stranger"), []

    @entry
    def main(argv: list[str] | None = None) -> int:
        run_python("import struct")
        seen.append((os.environ.get(VARIABLE), here in sys.path))
        if argv:
            raise ValueError("no such option")
        return 0

    sys.path[:0] = ["", here]
    monkeypatch.setenv("PATH", os.pathsep + os.environ["PATH"])
    before = (list(sys.path), dict(os.environ))
    assert main([]) == main(argv=[]) == 0
    with pytest.raises(ValueError, match="no such option"):
        main(["fails"])
    assert (sys.path, dict(os.environ)) == before
    assert main() == 0  # a command of its own
    assert seen == [("1", True)] * 3 + [("1", False)] and os.environ[VARIABLE] == "1"
    assert marks.read_text() == ""


@pytest.mark.slow
def test_an_installed_command(marks: Path) -> None:
    """It starts other programs; PATH has an empty entry."""
    command = [Path(sysconfig.get_path("scripts")) / "dit-bench", "--env"]
    given = os.environ | {"PATH": os.pathsep + os.environ["PATH"]}
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and marks.read_text() == "", done.stderr
