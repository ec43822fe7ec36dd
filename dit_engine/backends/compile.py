"""The reference model under torch.compile (Inductor), whose results are kept in a private cache."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib import import_module
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from dit_engine.backends.eager import EagerBackend
from dit_engine.current_directory import LEAVE_OUT, left_out_of_children
from dit_engine.errors import BackendUnavailable
from dit_engine.io.caches import private_cache
from dit_engine.model import DiT

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_INDUCTOR = "torch._inductor"


class CompileBackend(EagerBackend):
    """One graph per batch size, in which every shape is a constant.

    The compiler's kernels for shapes that it does not know are slower, and on CUDA rule out some of
    its own CUDA graphs; a batch size costs a compilation when it is first met.
    """

    def __init__(self, model: DiT, precision: str, device: torch.device, **options: Any) -> None:
        """options: of torch.compile."""
        super().__init__(model, precision, device)
        if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise BackendUnavailable(
                "backend 'compile' needs a C++ compiler (g++ or clang++) on the CPU"
            )
        self.one_by_one = False
        module = self.model

        def run(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return module(x, t, y)

        compiled: dict[int, Callable[..., Tensor]] = {}

        def forward(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            if len(x) not in compiled:  # if two threads compile at once, one result is kept
                compiled.setdefault(len(x), compile_static(run, **options))
            return compiled[len(x)](x, t, y)

        self.forward = forward


def compile_static(function: FunctionType, **options: Any) -> Callable[..., Any]:
    """torch.compile of ``function`` for the shapes that it is called with, as one graph.

    torch gives up after eight compilations of one code object. Here each compilation has its own
    code object, so those for other shapes, models and engines do not count. Whatever torch.compile
    cannot do is an error; by default it would silently run eagerly.
    """
    f, code = function, function.__code__.replace()
    own = FunctionType(code, f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    return compile_graph(own, **options)


def compile_graph(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """torch.compile of a function or module as one graph whose shapes are constants.

    The compiler keeps its results in our private cache. It compiles in the first call, where it
    starts a C++ compiler and Python programs; these run nothing from the current directory, because
    PYTHONSAFEPATH is set in the environment of the whole process during that call.
    """
    use_private_cache()
    if sys.version_info < (3, 11):
        _change_probe()
    compiled = torch.compile(function, fullgraph=True, dynamic=False, **options)
    called = False

    def run(*arguments: Any) -> Any:
        nonlocal called
        if called:
            return compiled(*arguments)
        with left_out_of_children():
            result = compiled(*arguments)
        # Python programs are started once in a process: a test of the processor, whose result torch
        # keeps, and workers. A later compilation, as after torch.set_num_threads, starts none.
        called = True
        return result

    return run


def _change_probe() -> None:
    """For Python 3.10, which ignores PYTHONSAFEPATH: torch probes the processor by ``python -c``;
    add first lines to its program that leave out the current directory."""
    kinds: Any = import_module("torch._inductor.cpu_vec_isa")
    usual = kinds.VecISA._avx_py_load
    if not usual.startswith(LEAVE_OUT):
        kinds.VecISA._avx_py_load = LEAVE_OUT + usual


def use_private_cache() -> None:
    """Set torch's cache directory; call this before torch compiles anything.

    By default it has a known name in the temporary directory, so another user could make it first.
    Its files are unpickled, included when kernels are compiled, and run.

    A directory that the user chose with `CACHE_VARIABLE` is kept. torch reads the variable whenever
    it compiles, and sets it to its default directory as soon as the compiler is imported. Headers
    that it compiles go to the default directory in any case, so the default is changed too.
    """
    directory = _directory()
    loaded = sys.modules.get(f"{_INDUCTOR}.runtime.cache_dir_utils")
    usual = directory if loaded is None else loaded.default_cache_dir()
    if os.environ.get(CACHE_VARIABLE, usual) == usual:
        os.environ[CACHE_VARIABLE] = directory
    codecache: Any = import_module(f"{_INDUCTOR}.codecache")
    for name in ("cache_dir_utils", "runtime_utils"):
        module: Any = import_module(f"{_INDUCTOR}.runtime.{name}")
        module.default_cache_dir = codecache.default_cache_dir = lambda: directory
    headers = os.path.join(directory, "precompiled_headers")  # noqa: PTH118 (torch adds to it)
    if getattr(codecache, "_HEADER_DIR", headers) != headers:
        codecache._HEADER_DIR = headers
        codecache._HEADER_LOCK_DIR = os.path.join(headers, "locks")  # noqa: PTH118
        codecache._precompile_header.cache_clear()  # its results hold the old paths


def _directory() -> str:
    try:
        return str(private_cache("inductor"))
    except (OSError, ValueError) as error:
        warnings.warn(f"what torch compiles is kept only for this process: {error}", stacklevel=2)
        return _temporary()


@functools.cache
def _temporary() -> str:
    directory = tempfile.mkdtemp(prefix="dit-engine-inductor-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory
