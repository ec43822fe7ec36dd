"""What the tests of the native kernels share: every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dit_kernels.cpu import loader as native_library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (36, 384, 768, 1024, 1152)
TOKENS = (1, 37, 256)

_LIBRARY, WHY_NOT = native_library.load()
_HIGHEST = _LIBRARY.dit_isa() if _LIBRARY else 0
LEVELS = native_library.ISAS[1 : _HIGHEST + 1]
needs_library = pytest.mark.skipif(_LIBRARY is None, reason=WHY_NOT)


@pytest.fixture(params=LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels use this instruction set for the length of the test."""
    assert _LIBRARY is not None
    _LIBRARY.dit_set_isa(native_library.ISAS.index(request.param))
    yield request.param
    _LIBRARY.dit_set_isa(_HIGHEST)


@pytest.fixture(params=[1, 3], ids=lambda count: f"{count}threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def one_off(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory that starts one element after an aligned address."""
    size = 1
    for length in shape:
        size *= length
    return torch.empty(size + 1, dtype=dtype)[1:].view(shape)
