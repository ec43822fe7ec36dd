"""Memory that a backend takes: its weights when it is made, and the most while it first runs.

On CUDA torch's allocator tells exactly. On the CPU it is the process's resident memory, read every
few milliseconds, above what it was before: freed memory that could not be given back to the system
is used again without showing, so a figure may be too small.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from dit_bench.cpu_memory import Sampler, resident_bytes

MIB = 2**20


class MemoryWatch:
    """Watches the first building and the first call of one function.

    Attributes:
        built_mib: taken by building; peak_mib: the most in the first call, above before building.
        None until then, and where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.built_mib: float | None = None
        self.peak_mib: float | None = None

    def around(self, build: Callable[[], Callable[[], Any]]) -> Callable[[], Callable[[], Any]]:
        """``build`` under watch, and the first call of what it gives."""

        def watched() -> Callable[[], Any]:
            before = self._now()
            function = build()
            after = self._now()
            if before is None or after is None:
                return function
            self.built_mib = (after - before) / MIB
            first = True

            def call() -> Any:
                nonlocal first
                if not first:
                    return function()
                first = False
                result, peak = self._peak_of(function)
                self.peak_mib = (peak - before) / MIB
                return result

            return call

        return watched

    def record(self) -> dict[str, float]:
        """What was seen, by name."""
        values = {"built_mib": self.built_mib, "peak_mib": self.peak_mib}
        return {name: round(value, 1) for name, value in values.items() if value is not None}

    def _now(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        _give_back()
        try:
            return resident_bytes()["total"]
        except OSError:
            return None

    def _peak_of(self, function: Callable[[], Any]) -> tuple[Any, int]:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            result = function()
            return result, torch.cuda.max_memory_allocated(self.device)
        with Sampler() as seen:
            result = function()
        return result, seen.peak["total"]


def _give_back() -> None:
    """Free what no one uses any more, and let glibc, where it is, return it to the system."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
