"""The quickest of several functions that compute the same, by measurement on the device."""

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
"""A candidate must need at least this share less time than the default. Smaller differences are
those of two runs."""
ROUNDS = 5, 40
BUDGET_S = 0.3
"""For the samples of one choice. The fewest rounds are run even if they take longer."""
ERRORS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""How far a row of a result may be from the default's, relative to its norm: two units in the last
place, several times what rounding both gives."""
_FLUSH_BYTES = 2**28
_FLUSHES = 4

Result = Tensor | tuple[Tensor, ...]
Times = dict[str, float | None]
"""Candidate → median milliseconds, None if it was dropped; the default comes first."""
Sample = Callable[[Callable[[], object]], float]
"""Runs a function once and returns its milliseconds."""


class Chooser:
    """Chooses once for each key, and remembers.

    Args:
        recall, remember: the memory, such as a dictionary's ``get`` and ``__setitem__``, or a file.
        sample: `cuda_sample` of the device.
        clock: seconds, for the budget.

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
        """The name of the candidate to use; the first one is the default.

        A candidate that raises, or whose result is not the default's but for rounding (`ERRORS`),
        is dropped with a warning of one line. Where choosing is turned off, it is the default.

        Args:
            key: the operator, shape and dtype, as one line.
            prepare: called before every call of a candidate, not measured.

        Raises torch.OutOfMemoryError if there is not enough memory for a candidate; nothing is
        remembered then.
        """
        if not self._on or len(candidates) == 1:
            return next(iter(candidates))
        times = self._recall(key)
        if times is None or self.measures(key, candidates):
            if times is not None:
                told = f"{key}: there are other candidates now; measured again"
                warnings.warn(told, stacklevel=2)
            times = self._measured(key, candidates, prepare)
            self._remember(key, times)
        return quickest(times)

    def measures(self, key: str, candidates: Iterable[str]) -> bool:
        """Whether `choose` would measure."""
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
            except Exception as error:  # whatever a kernel may die of
                if name == default:
                    raise
                reason = " ".join(str(error).split())[:300] or type(error).__name__
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
            # Each round begins elsewhere, so that no candidate always follows the same one.
            order = list(runs)
            shift = i % len(order)
            for name in order[shift:] + order[:shift]:
                attempt(name, lambda n=name: samples[n].append(self._sample(runs[n])))
        return {n: statistics.median(samples[n]) if n in runs else None for n in candidates}


def choosing() -> bool:
    """Whether anything is measured: unless the environment has ``DIT_KERNELS_CHOOSE=0``."""
    given = os.environ.get(VARIABLE, "1")
    if given not in ("0", "1"):
        raise ValueError(f"{VARIABLE}={given!r}: choose 0 (defaults) or 1 (measure)")
    return given == "1"


def quickest(times: Mapping[str, float | None]) -> str:
    """The candidate with the least time, or the first one unless that is clearly slower."""
    default = next(iter(times))
    known = {name: ms for name, ms in times.items() if ms is not None}
    best = min(known, key=known.__getitem__, default=default)
    usual = known.get(default)
    return best if usual is None or known[best] <= (1 - ADVANTAGE) * usual else default


def cuda_sample(device: torch.device) -> Sample:
    """A `Sample` that finds cold caches: weights come from memory in a forward too, whose other
    layers have passed through the caches."""

    def sample(run: Callable[[], object]) -> float:
        stream = torch.cuda.current_stream(device)
        scratch = torch.empty(_FLUSH_BYTES // 4, device=device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Reads, after which the caches have nothing to write back. They also keep the device busy
        # while the host queues the launches, whose Python must not be measured.
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
    """Raise ValueError unless the result is the expected one, but for rounding."""
    for found, wanted in zip(_tensors(result), expected, strict=True):
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise ValueError(
                f"its result is {found.dtype} {tuple(found.shape)}, "
                f"not {wanted.dtype} {tuple(wanted.shape)}"
            )
        error, allowed = worst_row(found, wanted), ERRORS[wanted.dtype]
        if not error <= allowed:  # NaN does not pass
            raise ValueError(f"a row of its result is {error:.2g} off, allowed is {allowed:g}")


def worst_row(found: Tensor, wanted: Tensor) -> float:
    """The largest relative error of a row, in the Frobenius norm; rows of less than the usual norm
    are divided by that. Over all rows at once, a few wrong ones would not show."""
    # Image by image: whole results in float32 would need more memory than a forward.
    norms = torch.stack([b.float().norm(dim=-1) for b in wanted])
    errors = torch.stack(
        [(a.float() - b.float()).norm(dim=-1) for a, b in zip(found, wanted, strict=True)]
    )
    usual = norms.square().mean().sqrt().clamp(min=1e-30)  # zeros equal zeros
    return (errors / norms.maximum(usual)).max().item()
