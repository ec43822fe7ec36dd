"""Compiles several kernels at the same time, before they are launched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from dit_kernels.triton.launch import ONLY_COMPILING


@contextmanager
def only_compiling(workers: int, device: torch.device) -> Iterator[list[Any]]:
    """Inside the block, launchers that this thread calls compile their kernels on ``workers``
    threads and do not run them.

    After the block, the yielded list holds the compiled kernels, which are loaded on ``device``. A
    kernel that cannot be compiled or loaded raises its error later, when it is launched.

    Raises ImportError if this version of Triton has no `AsyncCompileMode`.
    """
    from triton.runtime._async_compile import AsyncCompileMode, active_mode

    kernels: list[Any] = []

    def loaded(kernel: Any) -> Any:
        here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with here:
            return kernel.run  # reading this loads the kernel; Triton 3.6 compiles its C launcher

    with ThreadPoolExecutor(workers) as pool:
        mode = AsyncCompileMode(pool, ignore_errors=True)
        outer, before = active_mode.get(), ONLY_COMPILING.set(True)
        try:
            with mode:
                yield kernels
        finally:
            active_mode.set(outer)  # an interrupt at the end of the mode would have left it set
            ONLY_COMPILING.reset(before)
        compiled = [each.result() for each in mode.raw_futures if each.exception() is None]
        ready = [pool.submit(loaded, kernel) for kernel in compiled]
        kernels += [
            kernel
            for kernel, each in zip(compiled, ready, strict=True)
            if each.exception() is None
        ]  # fmt: skip
