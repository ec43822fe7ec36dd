"""Is an output right? Against float64, in units of what the plain torch code gets wrong itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_bench.operator_cases import Case

Run = Callable[..., Any]


class DeviceLost(RuntimeError):
    """The device answers no more, and nothing after this could be measured."""


def check_device(device: torch.device, culprit: str) -> None:
    """Raises `DeviceLost`, naming the culprit, if a CUDA error has ended the process's context."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        first = str(error).strip().split("\n")[0]
        raise DeviceLost(f"the device failed in {culprit}: {first}") from None


class Target:
    """What a case's outputs must be, and how far the same-dtype reference is from it."""

    def __init__(self, case: Case, arguments: tuple[Any, ...]) -> None:
        self.case, self.arguments = case, arguments
        exact = (case.exact or case.reference)(*map(_double, arguments))
        self.exact = tuple(t.double() for t in tensors(exact))
        self.same = case.reference(*arguments)
        self.budgets = self.errors(self.same)

    def errors(self, result: Any) -> list[float]:
        """`relative_error` of each output."""
        values = self.case.values
        found = values(self.arguments, result) if values else tensors(result)
        return [relative_error(a, b) for a, b in zip(found, self.exact, strict=True)]

    def worst(self, run: Run) -> tuple[float, float]:
        """(largest error over the reference's own, largest error) of two calls of ``run``.

        Memory that is likely to be handed out for the outputs is filled with NaN beforehand, so
        that an element never written shows; a race may show in one of the calls.
        """
        ratios, errors = [], []
        for _ in range(2):
            poison(tensors(self.same))
            found = self.errors(run(*self.arguments))
            errors += found
            ratios += [over(e, b) for e, b in zip(found, self.budgets, strict=True)]
        return largest(ratios), largest(errors)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """max |actual − exact| / max |exact| in float64, infinite for another shape; NaN stays NaN."""
    if actual.shape != exact.shape:
        return math.inf
    if not exact.numel():
        return 0.0
    difference = (actual.double() - exact.double()).abs().max()
    return (difference / exact.double().abs().max().clamp(min=1e-300)).item()


def rms_error(actual: Tensor, exact: Tensor) -> float:
    """‖actual − exact‖ / ‖exact‖ in float64, infinite for another shape."""
    if actual.shape != exact.shape:
        return math.inf
    difference = (actual.double() - exact.double()).norm()
    return (difference / exact.double().norm().clamp(min=1e-300)).item()


def poison(outputs: Iterable[Tensor]) -> None:
    """Fill and free memory of the outputs' sizes: all ones is NaN in every floating dtype."""
    blocks = [
        torch.full((t.numel() * t.element_size(),), 255, dtype=torch.uint8, device=t.device)
        for t in outputs
    ]
    del blocks


def over(error: float, budget: float) -> float:
    """error / budget, where 0 / 0 is 0."""
    return error / budget if budget else (0.0 if error == 0 else math.inf)


def largest(values: Sequence[float]) -> float:
    """Their maximum; NaN if any is NaN, which Python's own max does not promise."""
    return math.nan if any(math.isnan(v) for v in values) else max(values)


def tensors(result: Any) -> tuple[Tensor, ...]:
    """An operator's result as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _double(argument: Any) -> Any:
    floating = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.double() if floating else argument
