"""Measures several functions that compute the same result and chooses the fastest."""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

VARIABLE = "DIT_KERNELS_CHOOSE"
ADVANTAGE = 0.02
"""A candidate must be at least this share faster than the default. Two runs of one kernel can
differ by less than that."""
ROUNDS = 5, 40
"""Fewest and most rounds of one choice."""
BUDGET_S = 0.3
"""Seconds for the rounds of one choice. The fewest rounds are run even if they take longer."""
ERRORS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest allowed distance between a row of a result and the default's row, relative to the norm of
the row: two units in the last place, several times what rounding both results gives."""
_FLUSH_BYTES = 2**28
_FLUSHES = 4

Result = Tensor | tuple[Tensor, ...]
Times = dict[str, float | None]
"""Candidate → median in milliseconds, or None if it was dropped. The default comes first."""
Sample = Callable[[Callable[[], object]], float]
"""Runs a function once and returns its milliseconds."""


class Chooser:
    """Chooses once for each key and stores the times.

    Args:
        recall, remember: read and write stored times by key, such as a dictionary's ``get`` and
            ``__setitem__``, or those of a file.
        sample: measures one run, such as `cuda_sample` of the device.
        clock: returns seconds; it limits the rounds to `BUDGET_S`.

    Raises ValueError if the environment's `VARIABLE` is neither 0 nor 1.
    """

    def __init__(
        self,
        recall: Callable[[str], Times | None],
        remember: Callable[[str, Times], object],
        sample: Sample,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._recall, self._remember = recall, remember
        self._sample, self._clock = sample, clock
        self._on = choosing()

    def choose(
        self,
        key: str,
        candidates: Mapping[str, Callable[[], Result]],
        prepare: Callable[[], object] = lambda: None,
    ) -> str:
        """The name of the candidate to use. The first candidate is the default.

        A candidate is dropped with a one-line warning if it raises, or if its result differs from
        the default's by more than rounding (`ERRORS`). If choosing is turned off, the default is
        returned and nothing is called.

        Args:
            key: one line with the operator, shape and dtype.
            prepare: called before every call of a candidate; its time is not measured.

        Raises:
            torch.OutOfMemoryError: too little memory for a candidate; nothing is stored then.
            Exception: whatever the default itself raises.
        """
        if not self._on or len(candidates) == 1:
            return next(iter(candidates))
        times = self._recall(key)
        if times is None or self.measures(key, candidates):
            if times is not None:
                told = f"{key}: the candidates have changed; they are measured again"
                warnings.warn(told, stacklevel=2)
            times = self._measured(key, candidates, prepare)
            self._remember(key, times)
        return quickest(times)

    def measures(self, key: str, candidates: Iterable[str]) -> bool:
        """Whether `choose` would measure these candidates because their times are not known."""
        names, times = list(candidates), self._recall(key)
        return self._on and len(names) > 1 and (times is None or list(times) != names)

    def _measured(
        self,
        key: str,
        candidates: Mapping[str, Callable[[], Result]],
        prepare: Callable[[], object],
    ) -> Times:
        default, *others = candidates
        prepare()
        expected = [each.clone() for each in _tensors(candidates[default]())]
        runs = dict(candidates)

        def attempt(name: str, what: Callable[[], object]) -> None:
            try:
                prepare()
                what()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a kernel may raise anything
                if name == default:
                    raise
                reason = " ".join(str(error).split()) or type(error).__name__
                if len(reason) > 300:  # Triton's start with source code and end with the error
                    reason = f"{reason[:120]} … {reason[-180:]}"
                warnings.warn(f"{name} is not used for {key}: {reason}", stacklevel=4)
                del runs[name]

        for name in others:
            attempt(name, lambda run=runs[name]: _check(run(), expected))
        samples: dict[str, list[float]] = {name: [] for name in candidates}
        least, most = ROUNDS
        start = self._clock()
        for i in range(most):
            if i >= least and self._clock() - start > BUDGET_S:
                break
            # Each round starts with another candidate, so that none is always the first.
            order = list(runs)
            shift = i % len(order)
            for name in order[shift:] + order[:shift]:
                attempt(name, lambda n=name: samples[n].append(self._sample(runs[n])))
        return {n: statistics.median(samples[n]) if n in runs else None for n in candidates}


def choosing() -> bool:
    """Whether kernels may be measured: True unless the environment has ``DIT_KERNELS_CHOOSE=0``.

    Raises ValueError if the variable is neither 0 nor 1.
    """
    given = os.environ.get(VARIABLE, "1")
    if given not in ("0", "1"):
        raise ValueError(f"{VARIABLE}={given!r}: choose 0 (defaults) or 1 (measure)")
    return given == "1"


def quickest(times: Mapping[str, float | None]) -> str:
    """The fastest candidate if it saves at least `ADVANTAGE`, otherwise the default (the first)."""
    default = next(iter(times))
    known = {name: ms for name, ms in times.items() if ms is not None}
    best = min(known, key=known.__getitem__, default=default)
    usual = known.get(default)
    return best if usual is None or known[best] <= (1 - ADVANTAGE) * usual else default


def cuda_sample(device: torch.device) -> Sample:
    """A `Sample` with cold caches on a CUDA device. In a forward, weights also come from memory,
    because the other layers have used the caches since."""

    def sample(run: Callable[[], object]) -> float:
        stream = torch.cuda.current_stream(device)
        scratch = torch.empty(_FLUSH_BYTES // 4, device=device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # These only read, so the caches have nothing to write back. They also keep the device busy
        # while the host queues the launches, so that the time of Python is not measured.
        for _ in range(_FLUSHES):
            scratch.max()
        begin.record(stream)
        run()
        end.record(stream)
        end.synchronize()
        return begin.elapsed_time(end)

    return sample


def _tensors(result: Result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def _check(result: Result, expected: list[Tensor]) -> None:
    """Raise ValueError if the result differs from the expected one by more than rounding."""
    for found, wanted in zip(_tensors(result), expected, strict=True):
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise ValueError(
                f"its result is {found.dtype} {tuple(found.shape)}, "
                f"not {wanted.dtype} {tuple(wanted.shape)}"
            )
        error, allowed = worst_row(found, wanted), ERRORS[wanted.dtype]
        if not error <= allowed:  # NaN does not pass
            raise ValueError(f"a row of its result has error {error:.2g}, allowed is {allowed:g}")


def worst_row(found: Tensor, wanted: Tensor) -> float:
    """The largest relative error of a row (N, …, D), in the 2-norm.

    A row's error is divided by the norm of the wanted row, or by the root mean square of all norms
    if that is larger. An error over all rows at once would hide a few wrong rows.
    """
    # Per image, because whole results in float32 would need more memory than a forward.
    norms = torch.stack([b.float().norm(dim=-1) for b in wanted])
    errors = torch.stack(
        [(a.float() - b.float()).norm(dim=-1) for a, b in zip(found, wanted, strict=True)]
    )
    usual = norms.square().mean().sqrt().clamp(min=1e-30)  # zeros equal zeros
    return (errors / norms.maximum(usual)).max().item()
