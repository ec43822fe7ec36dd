"""Whose fault it is where a process has more than one OpenMP runtime."""

from __future__ import annotations

import ctypes
import warnings
from pathlib import Path

import torch

from dit_kernels import native_library


def check_runtimes(loaded: list[str], library: Path | None = None) -> None:
    """Warn where another package brought one of several; an AssertionError if our library did.

    library: ours, unless given.
    """
    if len(loaded) < 2:
        return
    told = f"{len(loaded)} OpenMP runtimes in this process: {', '.join(loaded)}"
    if library is None and native_library.load()[0] is not None:
        library = native_library.path()
    if library is not None:
        torchs = Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"
        assert _function_of_runtime(library) == _function_of_runtime(torchs), told
    warnings.warn(told, stacklevel=2)


def _function_of_runtime(library: Path) -> int | None:
    """The address of a function of the runtime that ``library``, which is loaded, depends on."""
    function = ctypes.CDLL(str(library)).omp_get_max_threads
    return ctypes.cast(function, ctypes.c_void_p).value
