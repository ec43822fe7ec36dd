"""Run no modules and no programs from the current directory, which may be a stranger's.

`python -m` and `python -c` look for modules in that directory first. Libraries and we start such
programs: torch's compiler, the pools of multiprocessing, our own probes. An empty
entry of PATH or LD_LIBRARY_PATH also means the current directory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from threading import Lock
from typing import Any

from dit_engine.first import leave_out_of_path

# If this is set, Python 3.11 and later leave the current directory out of ``sys.path``. LEAVE_OUT
# does the same in any version, as the first lines of a program for `python -c`.
VARIABLE = "PYTHONSAFEPATH"
LEAVE_OUT = "import sys\nsys.path[:] = [place for place in sys.path if place]\n"

_lock = Lock()
_blocks = 0
_undo = ExitStack()


def leave_out() -> None:
    """Take the current directory off all search paths, for this process and all that it starts.

    It stays on ``sys.path`` if PYTHONPATH names it, or if our own packages are there, as in a
    checkout. Only for our commands: a library must not change the process of its user.
    """
    os.environ[VARIABLE] = "1"
    if os.name == "nt":
        os.environ["NODEFAULTCURRENTDIRECTORYINEXEPATH"] = "1"
    absolute = os.path.isabs
    for name, wanted in ("PATH", absolute), ("LD_LIBRARY_PATH", absolute), ("PYTHONPATH", bool):
        places = os.environ.pop(name, "").split(os.pathsep)
        if kept := [place for place in places if wanted(place)]:
            os.environ[name] = os.pathsep.join(kept)
    leave_out_of_path()


@contextmanager
def left_out_of_children() -> Iterator[None]:
    """Do the same as `leave_out`, but only for Python programs that start while the block runs.
    `VARIABLE` is set in this process until the last such block, of any thread, ends."""
    global _blocks
    with _lock:
        if _blocks == 0:
            _undo.callback(_set, os.environ.get(VARIABLE))
            _set("1")
            if sys.version_info < (3, 11):  # which ignores the variable; "-I" is isolated mode
                util: Any = import_module("multiprocessing.util")
                usual = util._args_from_interpreter_flags
                _undo.callback(setattr, util, "_args_from_interpreter_flags", usual)
                util._args_from_interpreter_flags = lambda: [*usual(), "-I"]
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


def _set(value: str | None) -> None:
    os.environ.pop(VARIABLE, None)  # the program may have removed it meanwhile
    if value is not None:
        os.environ[VARIABLE] = value
