"""Modules and programs that lie in the current directory, which may be a stranger's, are not run.

Python puts that directory first among those in which `python -m` and `python -c` look for modules,
and libraries start such programs: torch's compiler, the pools of multiprocessing, our own probes.
An empty entry of PATH or LD_LIBRARY_PATH stands for it too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import RLock
from typing import Any

VARIABLE = "PYTHONSAFEPATH"
"""Python 3.11 and later then leave the directory out of ``sys.path``."""

LEAVE_OUT = "import sys\nsys.path[:] = [place for place in sys.path if place]\n"
"""How a program of `python -c` begins that does so itself."""

PACKAGES = ("dit_engine", "dit_kernels", "dit_export", "dit_bench")
_lock = RLock()


def leave_out() -> None:
    """Look for nothing in the current directory, in this process and in all that it starts.

    It stays where PYTHONPATH names it, or where our own packages lie there, as in a checkout. For
    commands, before they start anything: a library's process is not its own.
    """
    os.environ[VARIABLE] = "1"
    if os.name == "nt":
        os.environ["NODEFAULTCURRENTDIRECTORYINEXEPATH"] = "1"
    for name in ("PATH", "LD_LIBRARY_PATH"):
        _keep_of(name, os.path.isabs)
    _keep_of("PYTHONPATH", bool)
    try:
        here = os.getcwd()  # noqa: PTH109 (as Python itself writes it)
    except OSError:  # removed
        here = ""
    named = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    kept = {str(Path(place).absolute()) for place in named} | set(map(str, _folders()))
    sys.path[:] = [place for place in sys.path if place not in ("", here) or place in kept]


@contextmanager
def left_out_of_children() -> Iterator[None]:
    """The same for the Python programs that start inside the block; afterwards all is as before.

    One block at a time: others wait.
    """
    with _lock:
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = "1"
        try:
            with _isolated_pools():
                yield
        finally:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before


def python(code: str, *arguments: str) -> list[str]:
    """The command that runs ``code`` with the modules that this process can import."""
    path = [place for place in sys.path if place]
    return [sys.executable, "-c", f"import sys\nsys.path[:] = {path!r}\n{code}", *arguments]


def _keep_of(variable: str, wanted: Callable[[str], bool]) -> None:
    """Of a list of places in the environment, those that are ``wanted``."""
    if variable not in os.environ:
        return
    places = os.environ[variable].split(os.pathsep)
    if kept := [place for place in places if wanted(place)]:
        os.environ[variable] = os.pathsep.join(kept)
    else:
        del os.environ[variable]


def _folders() -> list[Path]:
    """In which our packages lie."""
    files = (getattr(sys.modules.get(name), "__file__", None) for name in PACKAGES)
    return [Path(file).resolve().parents[1] for file in files if file]


@contextmanager
def _isolated_pools() -> Iterator[None]:
    """What multiprocessing starts takes no directory of Python's own choice before it is told its
    parent's, for Python 3.10, which does not know `VARIABLE`."""
    if sys.version_info >= (3, 11):
        yield
        return
    util: Any = import_module("multiprocessing.util")
    usual = util._args_from_interpreter_flags
    util._args_from_interpreter_flags = lambda: [*usual(), "-I"]
    try:
        yield
    finally:
        util._args_from_interpreter_flags = usual
