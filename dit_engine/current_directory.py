"""Run no modules and no programs from the current directory, which may be a stranger's.

`python -m` and `python -c` look for modules in that directory first, and such programs are started
by libraries and by us: torch's compiler, the pools of multiprocessing, our own probes. An empty
entry of PATH or LD_LIBRARY_PATH also means the current directory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from threading import Lock
from typing import Any

from dit_engine.first import leave_out_of_path

VARIABLE = "PYTHONSAFEPATH"
"""If this is set, Python 3.11 and later leave the current directory out of ``sys.path``."""

LEAVE_OUT = "import sys\nsys.path[:] = [place for place in sys.path if place]\n"
"""The first lines of a program for `python -c` that does the same in any version of Python."""

_lock = Lock()
_blocks = 0
_undo = ExitStack()
"""What the first of the running `_blocks` changed, to be undone after the last."""


def leave_out() -> None:
    """Take the current directory off all search paths, for this process and all that it starts.

    It stays on ``sys.path`` if PYTHONPATH names it, or if our own packages are there, as in a
    checkout. Only for our commands: a library must not change the process of its user.
    """
    os.environ[VARIABLE] = "1"
    if os.name == "nt":
        os.environ["NODEFAULTCURRENTDIRECTORYINEXEPATH"] = "1"
    for name in ("PATH", "LD_LIBRARY_PATH"):
        _filter_places(name, os.path.isabs)
    _filter_places("PYTHONPATH", bool)
    leave_out_of_path()


@contextmanager
def left_out_of_children() -> Iterator[None]:
    """Do the same as `leave_out`, but only for Python programs that start while the block runs.

    It sets `VARIABLE` in the environment of this whole process until the last such block ends:
    several threads may be in one.
    """
    global _blocks
    with _lock:
        if _blocks == 0:
            _undo.enter_context(_variable_set())
            _undo.enter_context(_isolated_pools())
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0:
                _undo.close()


def python(code: str, *arguments: str) -> list[str]:
    """A command that runs ``code``, which can import the same modules as this process, but none
    from the current directory."""
    path = [place for place in sys.path if place]
    return [sys.executable, "-c", f"import sys\nsys.path[:] = {path!r}\n{code}", *arguments]


def _filter_places(variable: str, wanted: Callable[[str], bool]) -> None:
    """Keep only the ``wanted`` entries of an environment variable such as PATH."""
    if variable not in os.environ:
        return
    places = os.environ[variable].split(os.pathsep)
    if kept := [place for place in places if wanted(place)]:
        os.environ[variable] = os.pathsep.join(kept)
    else:
        del os.environ[variable]


@contextmanager
def _variable_set() -> Iterator[None]:
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        if before is not None:
            os.environ[VARIABLE] = before
        else:
            os.environ.pop(VARIABLE, None)  # the program may have removed it meanwhile


@contextmanager
def _isolated_pools() -> Iterator[None]:
    """For Python 3.10, which ignores `VARIABLE`: processes of multiprocessing run in isolated mode,
    and take ``sys.path`` only from their parent."""
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
