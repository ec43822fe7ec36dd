"""What the tests of the native kernels share: every instruction set that this machine has."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dit_kernels.cpu import loader

_LIBRARY, WHY_NOT = loader.load()
_HIGHEST = _LIBRARY.dit_isa() if _LIBRARY else 0
LEVELS = loader.ISAS[1 : _HIGHEST + 1]
needs_library = pytest.mark.skipif(_LIBRARY is None, reason=WHY_NOT)
ALL_DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)


@pytest.fixture(params=LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels use this instruction set for the length of the test."""
    assert _LIBRARY is not None
    _LIBRARY.dit_set_isa(loader.ISAS.index(request.param))
    yield request.param
    _LIBRARY.dit_set_isa(_HIGHEST)


@pytest.fixture
def threads() -> Iterator[None]:
    """The test may change torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def one_off(like: Tensor) -> Tensor:
    """A copy that starts one element after an aligned address, channels-last if ``like`` is."""
    memory = torch.empty(math.prod(like.shape) + 1, dtype=like.dtype)[1:]
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        n, c, h, w = like.shape
        return memory.view(n, h, w, c).permute(0, 3, 1, 2).copy_(like)
    return memory.view(like.shape).copy_(like)
