"""Compare a Triton launcher with the reference, in float64 and in the launcher's own dtype."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from numerics import assert_close_to_reference
from torch import Tensor

from dit_kernels import reference


def launcher(operator: str) -> Any:
    return getattr(import_module(f"dit_kernels.triton.{operator}"), operator)


def check(operator: str, *arguments: Any, like: str | None = None, **options: Any) -> None:
    """Every result is as near to float64 as the torch reference (of name ``like``) allows."""
    definition = getattr(reference, like or operator)
    exact = _results(definition(*(_double(a) for a in arguments)))
    same_dtype = _results(definition(*arguments))
    actual = _results(launcher(operator)(*arguments, **options))
    assert len(actual) == len(exact)
    for result, wide, same in zip(actual, exact, same_dtype, strict=True):
        assert result.dtype == same.dtype
        assert_close_to_reference(result, wide, same_dtype=same)


def check_special(operator: str, *arguments: Any, like: str | None = None) -> None:
    """NaN and infinities are where the reference has them, and the rest is as near as allowed."""
    definition = getattr(reference, like or operator)
    exact = _results(definition(*(_double(a) for a in arguments)))
    same_dtype = _results(definition(*arguments))
    actual = _results(launcher(operator)(*arguments))
    for result, wide, same in zip(actual, exact, same_dtype, strict=True):
        finite = same.isfinite()
        torch.testing.assert_close(
            result.masked_fill(finite, 0), same.masked_fill(finite, 0), equal_nan=True
        )
        if finite.any():
            assert_close_to_reference(result[finite], wide[finite], same_dtype=same[finite])


def modulations(n: int, width: int, count: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The first ``count`` of six strided views (n, width) of one projection."""
    return random(n, 6 * width, dtype=dtype, seed=9).chunk(6, dim=1)[:count]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _double(argument: Any) -> Any:
    floating = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.double() if floating else argument


def _results(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results
