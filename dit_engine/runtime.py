"""What a computation runs on: devices, threads and memory."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from dit_engine.arguments import shown

T = TypeVar("T")

OLDEST_WITH_BFLOAT16 = (8, 0)
"""The compute capability of Ampere. Older GPUs have no bfloat16 arithmetic: torch emulates matrix
products, slowly, and refuses convolutions."""


def parse_device(device: str | torch.device | None) -> torch.device:
    """The torch device that ``device`` names; None is CUDA where there is one, else the CPU.

    A GPU named without an index is the calling thread's current one, see `with_index`.

    Raises ValueError, naming the allowed ones, for a device that is unknown or not there.
    """
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "xpu": torch.xpu.device_count() if torch.xpu.is_available() else 0,
    }
    if device is None:
        return with_index(torch.device("cuda" if counts["cuda"] else "cpu"))
    parsed = None
    if isinstance(device, str | torch.device):  # torch.device(3) would be an accelerator's index
        with contextlib.suppress(RuntimeError):
            parsed = torch.device(device)
    if str(parsed) != str(device):  # torch reads "cuda:256" as "cuda:0"
        parsed = None
    if parsed is None or not 0 <= (parsed.index or 0) < counts.get(parsed.type, 0):
        allowed = [name for name, count in counts.items() if count]
        allowed += [f"cuda:{i}" for i in range(counts["cuda"])]
        name = shown(str(device) if isinstance(device, torch.device) else device).strip("'")
        told = f"device '{name}' is not available; allowed: {', '.join(allowed)}"
        if name.startswith("cuda") and not counts["cuda"]:
            built = "finds no GPU" if torch.version.cuda else "is built without CUDA"
            told += f" (torch {torch.__version__} {built})"
        raise ValueError(told)
    return with_index(parsed)


def bfloat16_why_not(device: torch.device) -> str | None:
    """Why ``device`` cannot compute in bfloat16, or None if it can."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_WITH_BFLOAT16:
        return None
    found, oldest = (".".join(map(str, each)) for each in (capability, OLDEST_WITH_BFLOAT16))
    return f"{device} has compute capability {found}, and bfloat16 needs {oldest}"


def with_index(device: torch.device) -> torch.device:
    """``device`` with the index of the current GPU where it names a GPU without one.

    torch looks a missing index up again at every use, in the thread that uses it: after another
    `torch.cuda.set_device`, the labels would be on another GPU than the weights.
    """
    kind = {"cuda": torch.cuda, "xpu": torch.xpu}.get(device.type)
    if kind is None or device.index is not None or not kind.is_available():
        return device
    return torch.device(device.type, kind.current_device())


@contextlib.contextmanager
def neutral(device: torch.device | None = None) -> Iterator[None]:
    """Switch off, for this thread, the modes of its caller that would change what is computed:
    autocast (of the CPU and of ``device``), a default device, inference mode.

    A default dtype belongs to the whole process and cannot be switched off for one thread:
    whatever makes a tensor names its dtype.
    """
    with contextlib.ExitStack() as stack:
        for kind in {"cpu", "cpu" if device is None else device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if torch.is_inference_mode_enabled():
            gradients = torch.is_grad_enabled()
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(gradients))
        yield


_setting = threading.Lock()
_forked = False


@contextlib.contextmanager
def limited_threads(threads: int | None) -> Iterator[None]:
    """Compute with this number of CPU threads in this block, then with the earlier number; None
    changes nothing.

    The number belongs to the calling thread; torch's OpenMP regions and the native kernels obey
    it. Other threads keep theirs, and new threads get the process's default as before. In a forked
    child it is always one, see `survive_forks`.
    """
    before = torch.get_num_threads()
    threads = 1 if _forked else threads
    if threads is None or threads == before:
        yield
        return
    _set_for_this_thread(threads)
    try:
        yield
    finally:
        _set_for_this_thread(before)


def _set_for_this_thread(threads: int) -> None:
    """torch.set_num_threads sets the calling thread's number, and also the default of threads that
    have not used torch yet. Another thread therefore restores that default."""

    def in_a_new_thread(function: Callable[..., Any], *arguments: Any) -> Any:
        with ThreadPoolExecutor(1) as fresh:
            return fresh.submit(function, *arguments).result()

    with _setting:
        default = in_a_new_thread(torch.get_num_threads)
        torch.set_num_threads(threads)
        if default != threads:
            in_a_new_thread(torch.set_num_threads, default)


@functools.cache
def survive_forks() -> None:
    """From now on, a child of a fork computes on one thread.

    OpenMP's threads do not exist in the child, where torch would wait for them for ever.
    """

    def in_child() -> None:
        global _forked, _setting
        _forked, _setting = True, threading.Lock()  # a thread of the parent may have held it
        torch.set_num_threads(1)

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=in_child)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is some allocator's refusal, on the CPU or on a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = ("not enough memory", "out of memory", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in said)


def in_halves(
    run: Callable[[int, int], T], total: int, limit: int, splittable: bool = True
) -> list[T]:
    """Results of ``run(first, count)`` over ``total`` items in batches of at most ``limit``.

    A batch that runs out of memory is tried again at half the size, with a warning; later batches
    keep that size. Raises MemoryError when a single item (or an unsplittable batch) does not fit.
    """
    results: list[T] = []
    first = 0
    while first < total:
        count = min(limit, total - first)
        try:
            results.append(run(first, count))
            first += count
            continue
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if count == 1 or not splittable:
                raise MemoryError(f"out of memory with a batch of {count}: {error}") from error
        # Outside the except block, where the traceback would keep the failed batch alive.
        limit = count // 2
        warnings.warn(f"out of memory with a batch of {count}: going on with {limit}", stacklevel=3)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results
