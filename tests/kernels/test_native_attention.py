"""What only the native attention must stand, on every instruction set that the machine has."""

from __future__ import annotations

import pytest
import torch
from cases import qkv_of
from native_levels import ALL_DTYPES, isa, needs_library
from numerics import assert_close_to_reference

from dit_kernels import reference
from dit_kernels.cpu import operators as native

pytestmark = needs_library
__all__ = ["isa"]  # a fixture
HEADS = 2


@ALL_DTYPES
@pytest.mark.parametrize("t", [37, 300])  # one block of keys, and several
def test_scores_that_are_infinite_or_large(isa: str, t: int, dtype: torch.dtype) -> None:
    d = 64
    qkv = qkv_of(2, t, HEADS, d, dtype)
    q, k, v = qkv.view(2, t, 3, HEADS, d).unbind(2)
    q[0, 5], k[0, :, 1] = float("inf"), -1
    actual = native.attention(qkv, HEADS).view(2, t, HEADS, d)
    assert actual[0, 5, 1].isnan().all() and actual[0, :5].isfinite().all()
    large = 200 if dtype == torch.float16 else 1e18  # scores of 3e5 and 8e36
    q[:], k[:] = large, large
    exact, same_dtype = reference.attention(qkv.double(), HEADS), reference.attention(qkv, HEADS)
    assert_close_to_reference(native.attention(qkv, HEADS), exact, same_dtype=same_dtype)
    k[:, :-1] = -large  # the last key has all the weight
    last = v[:, -1:].expand(2, t, HEADS, d).reshape(2, t, -1)
    assert torch.equal(native.attention(qkv, HEADS), last)


@ALL_DTYPES
def test_equal_scores_of_any_size_weigh_alike(isa: str, dtype: torch.dtype) -> None:
    """Whichever way their scale was rounded."""
    t, d = 40, 64
    qkv = qkv_of(2, t, HEADS, d, dtype)
    q, k, v = qkv.view(2, t, 3, HEADS, d).unbind(2)
    mean = v.double().mean(1, keepdim=True).expand(2, t, HEADS, d).reshape(2, t, -1)
    for exponent in range(33 if dtype == torch.float16 else 140):
        q[:] = k[:] = 2 ** (exponent / 4)  # scores of up to 6e5, or of 2e22
        actual = native.attention(qkv, HEADS)
        assert_close_to_reference(actual, mean, tolerance=4 * torch.finfo(dtype).eps)


def test_every_nan_is_nan_whatever_its_lower_bits(isa: str) -> None:
    """They must not count as a power of two."""
    for bits in (-1, 0x7F800001, 0x7FC00001, -0x00400001):
        qkv = qkv_of(2, 37, HEADS, 64, torch.float32)
        qkv.view(torch.int32)[0, 5, HEADS * 64 + 3] = bits  # of a key
        actual, expected = native.attention(qkv, HEADS), reference.attention(qkv, HEADS)
        assert expected[0, :, :64].isnan().all()
        assert torch.equal(actual.isnan(), expected.isnan()), hex(bits)


@ALL_DTYPES
def test_it_reads_and_writes_nothing_outside(isa: str, dtype: torch.dtype) -> None:
    t, d = 37, 72
    # A sum would show the NaN.
    memory = torch.full((t * 3 * HEADS * d + 128,), float("nan"), dtype=dtype)
    qkv = memory[64:-64].view(1, t, -1).copy_(qkv_of(1, t, HEADS, d, dtype))
    around = torch.full((t * HEADS * d + 128,), 7, dtype=dtype)
    out = native.attention(qkv, HEADS, out=around[64:-64].view(1, t, -1))
    assert torch.equal(out, native.attention(qkv.clone(), HEADS)) and out.isfinite().all()
    assert (around[:64] == 7).all() and (around[-64:] == 7).all()
