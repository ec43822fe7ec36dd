"""dit_attention on every instruction set that the machine has, against float64."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from native_levels import DTYPES
from numerics import assert_close_to_reference, relative_error
from torch import Tensor

from dit_kernels import reference
from dit_kernels.cpu import operators as native
from dit_kernels.cpu.loader import DTYPE_CODES, ISAS, load

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))

HEADS = 2
# Less than a block of queries (32), ragged ones, whole ones.
TOKENS = (1, 5, 16, 37, 256, 300)
HEAD_DIMS = (8, 24, 32, 48, 64, 72, 96, 128)


@pytest.fixture(params=ISAS[1:])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    library, before = loaded(), native.isa()
    library.dit_set_isa(ISAS.index(request.param))
    try:
        if native.isa() != request.param:
            pytest.skip(f"this machine has {before}")
        yield request.param
    finally:
        library.dit_set_isa(ISAS.index(before))


def loaded() -> Any:
    return load()[0]


def projection(t: int, d: int, dtype: torch.dtype, n: int = 2, heads: int = HEADS) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * d + t)
    return torch.randn(n, t, 3 * heads * d, generator=generator).to(dtype)


def plain_torch(qkv: Tensor) -> Tensor:
    """As DiT's Attention has it."""
    n, t, width = qkv.shape
    q, k, v = qkv.view(n, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, width // 3)


@functools.cache  # the same for every instruction set
def expected_of(t: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, by the reference in dtype, by torch's own attention in dtype."""
    qkv = projection(t, d, dtype)
    exact = reference.attention(qkv.double(), HEADS)
    return exact, reference.attention(qkv, HEADS), plain_torch(qkv)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_float64(isa: str, d: int, dtype: torch.dtype) -> None:
    errors, errors_of_torch = [], []
    for t in TOKENS:
        exact, same_dtype, by_torch = expected_of(t, d, dtype)
        actual = native.attention(projection(t, d, dtype), HEADS)
        assert_close_to_reference(actual, exact, same_dtype=same_dtype)
        errors.append(relative_error(actual, exact))
        errors_of_torch.append(relative_error(by_torch, exact))
    # Not one by one: on few tokens torch's own two ways differ by more than a factor of two.
    assert max(errors) <= 2 * max(errors_of_torch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [1024, 1300])
def test_many_blocks_of_keys(isa: str, t: int, dtype: torch.dtype) -> None:
    # Growing keys: the running maximum moves in every block, and what was summed is rescaled.
    qkv = projection(t, 72, dtype, n=1)
    k = qkv.view(t, 3, HEADS, 72)[:, 1]
    k.copy_((k.float() * torch.linspace(0.1, 4, t).view(t, 1, 1)).to(dtype))
    exact, same_dtype = reference.attention(qkv.double(), HEADS), reference.attention(qkv, HEADS)
    assert_close_to_reference(native.attention(qkv, HEADS), exact, same_dtype=same_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_heads_and_images(isa: str, dtype: torch.dtype) -> None:
    qkv = projection(40, 72, dtype, n=3, heads=16)
    exact, same_dtype = reference.attention(qkv.double(), 16), reference.attention(qkv, 16)
    assert_close_to_reference(native.attention(qkv, 16), exact, same_dtype=same_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch(isa: str, dtype: torch.dtype) -> None:
    assert native.attention(torch.empty(0, 16, 3 * 128, dtype=dtype), HEADS).shape == (0, 16, 128)


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_does_not_depend_on_threads(isa: str, dtype: torch.dtype) -> None:
    n, t, d = 3, 300, 72
    qkv = projection(t, d, dtype, n=n)
    results = []
    for threads in (1, 2, 3, 7, 64):
        out = torch.empty(n, t, HEADS * d, dtype=dtype)
        call = (qkv.data_ptr(), out.data_ptr(), n, t, HEADS, d, DTYPE_CODES[dtype], threads)
        assert loaded().dit_attention(*call) == 0
        results.append(out)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("t", [37, 300])
def test_nan_and_infinity_spread_as_in_the_reference(
    isa: str, t: int, which: int, value: float, dtype: torch.dtype
) -> None:
    qkv = projection(t, 72, dtype)
    qkv.view(2, t, 3, HEADS, 72)[1, t // 2, which, 0, 3] = value
    actual, expected = native.attention(qkv, HEADS), reference.attention(qkv, HEADS)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
    finite, infinite = expected.isfinite(), expected.isinf()
    assert not finite.all() and torch.equal(actual[infinite], expected[infinite])
    exact = reference.attention(qkv.double(), HEADS)[finite]
    assert_close_to_reference(actual[finite], exact, same_dtype=expected[finite])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [37, 300])
def test_a_row_of_minus_infinity_is_nan(isa: str, t: int, dtype: torch.dtype) -> None:
    qkv = projection(t, 64, dtype)
    q, k, _ = qkv.view(2, t, 3, HEADS, 64).unbind(2)
    q[0, 5], k[0, :, 1] = float("inf"), -1
    actual = native.attention(qkv, HEADS).view(2, t, HEADS, 64)
    assert actual[0, 5, 1].isnan().all() and actual[0, :5].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(isa: str, dtype: torch.dtype) -> None:
    t, d = 300, 64
    qkv = projection(t, d, dtype)
    q, k, v = qkv.view(2, t, 3, HEADS, d).unbind(2)
    large = 200 if dtype == torch.float16 else 1e18  # scores of 3e5 and 8e36
    q[:], k[:] = large, large
    exact, same_dtype = reference.attention(qkv.double(), HEADS), reference.attention(qkv, HEADS)
    assert_close_to_reference(native.attention(qkv, HEADS), exact, same_dtype=same_dtype)
    k[:, :-1] = -large  # the last key has all the weight
    last = v[:, -1:].expand(2, t, HEADS, d).reshape(2, t, -1)
    assert torch.equal(native.attention(qkv, HEADS), last)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_scores_of_any_size(isa: str, dtype: torch.dtype) -> None:
    """They weigh alike, whichever way their scale was rounded."""
    t, d = 40, 64
    qkv = projection(t, d, dtype)
    q, k, v = qkv.view(2, t, 3, HEADS, d).unbind(2)
    mean = v.double().mean(1, keepdim=True).expand(2, t, HEADS, d).reshape(2, t, -1)
    budget = 4 * torch.finfo(dtype).eps
    for exponent in range(33 if dtype == torch.float16 else 140):
        q[:] = k[:] = 2 ** (exponent / 4)  # scores of up to 6e5, or of 2e22
        assert_close_to_reference(native.attention(qkv, HEADS), mean, tolerance=budget)


def test_every_nan_is_nan(isa: str) -> None:
    """Whatever its lower bits: they must not count as a power of two."""
    for bits in (-1, 0x7F800001, 0x7FC00001, -0x00400001):
        qkv = projection(37, 64, torch.float32)
        qkv.view(torch.int32)[0, 5, HEADS * 64 + 3] = bits  # of a key
        actual, expected = native.attention(qkv, HEADS), reference.attention(qkv, HEADS)
        assert expected[0, :, :64].isnan().all()
        assert torch.equal(actual.isnan(), expected.isnan()), hex(bits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_and_writes_nothing_outside(isa: str, dtype: torch.dtype) -> None:
    t, d = 37, 72
    count = t * 3 * HEADS * d
    memory = torch.full((count + 128,), float("nan"), dtype=dtype)  # in the sums, it would show
    qkv = memory[64:-64].view(1, t, -1).copy_(projection(t, d, dtype, n=1))
    around = torch.full((t * HEADS * d + 128,), 7, dtype=dtype)
    out = native.attention(qkv, HEADS, out=around[64:-64].view(1, t, -1))
    assert torch.equal(out, native.attention(qkv.clone(), HEADS)) and out.isfinite().all()
    assert (around[:64] == 7).all() and (around[-64:] == 7).all()


@pytest.mark.parametrize(
    "change",
    [
        {"n": -1}, {"t": -1}, {"heads": 0}, {"d": 0}, {"d": 12}, {"d": 136}, {"dtype": 3},
        {"threads": 0}, {"qkv": None}, {"out": None}, {"qkv": 65}, {"out": 65},
    ],
    ids=str,
)  # fmt: skip
def test_refusals_of_the_c_interface(change: dict[str, Any]) -> None:
    call = {"qkv": 64, "out": 64, "n": 1, "t": 4, "heads": 2, "d": 64, "dtype": 1, "threads": 1}
    assert loaded().dit_attention(*{**call, **change}.values()) < 0
