"""The reference model under torch.compile (Inductor)."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from dit_engine.backends.compiler_cache import use_private_cache
from dit_engine.backends.eager import EagerBackend
from dit_engine.current_directory import LEAVE_OUT, left_out_of_children
from dit_engine.errors import BackendUnavailable
from dit_engine.model import DiT


class CompileBackend(EagerBackend):
    """One graph per batch size, in which every shape is a constant.

    The compiler's kernels for shapes that it does not know are slower, and on CUDA rule out some of
    its own CUDA graphs; a batch size costs a compilation when it is first met.
    During it, PYTHONSAFEPATH is set in the environment of the process (see `compile_graph`).
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
            if len(x) not in compiled:  # two threads at once: one of them keeps its function
                compiled.setdefault(len(x), compile_static(run, **options))
            return compiled[len(x)](x, t, y)

        self.forward = forward


def compile_static(function: FunctionType, **options: Any) -> Callable[..., Any]:
    """torch.compile of ``function`` for the shapes that it is called with, as one graph.

    torch counts compilations a code object, and gives up after eight of them. A code object of its
    own keeps this one from being charged for others: other shapes, models and engines. Whatever
    torch.compile cannot do is an error, where it would otherwise run eagerly without a word.
    """
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
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
