"""The one way in which tests compare tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def relative_error(actual: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    """max |actual − expected| / max |expected|, computed in float64; inf or NaN where either is."""
    a = torch.as_tensor(actual).detach().double().cpu()
    b = torch.as_tensor(expected).detach().double().cpu()
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)} differ"
    assert b.numel() > 0 and bool((b != 0).any()), (
        "a relative error needs a reference that is not 0"
    )
    return ((a - b).abs().max() / b.abs().max()).item()


def assert_close_to_reference(
    actual: Tensor | np.ndarray,
    exact: Tensor | np.ndarray,
    *,
    tolerance: float | None = None,
    same_dtype: Tensor | None = None,
) -> None:
    """The error of ``actual`` against ``exact`` is within budget.

    Args:
        tolerance: the budget, a relative error; or instead of it
        same_dtype: the plain torch reference run in the dtype of ``actual``: the budget is twice
            its error.
    """
    assert (tolerance is None) != (same_dtype is None), "give exactly one budget"
    budget = tolerance if same_dtype is None else 2 * relative_error(same_dtype, exact)
    error = relative_error(actual, exact)
    assert budget is not None and error <= budget, f"relative error {error:.3g} > {budget:.3g}"


@contextmanager
def exact_float32() -> Iterator[None]:
    """CUDA's float32 products and convolutions in float32, not in TF32."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
