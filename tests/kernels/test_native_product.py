"""The native linear layers with packed weights against float64."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_void_p

import pytest
import torch
import torch.nn.functional as F
from native_levels import needs_library, one_off
from numerics import assert_close_to_reference
from torch import Tensor

from dit_kernels.cpu import loader as native_library

_LIBRARY = native_library.load()[0]
_LEVEL = native_library.ISAS[_LIBRARY.dit_isa()] if _LIBRARY else "none"
pytestmark = [
    needs_library,
    pytest.mark.skipif(_LEVEL not in ("avx512_bf16", "amx"), reason="needs AVX512-BF16"),
]

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 4}
DTYPES = (torch.float32, torch.bfloat16)
# Rows, inputs, outputs: whole blocks, and tails of each; several sums of sums.
SHAPES = [
    (256, 384, 1152), (128, 256, 256), (64, 1152, 384), (37, 77, 50), (15, 130, 1), (23, 2307, 97),
    (1, 4608, 100), (300, 1201, 17),
]  # fmt: skip


def call(name: str, *arguments: object) -> int:
    """What the function returns; tensors are passed as pointers, None as null, numbers as int64."""
    assert _LIBRARY is not None
    passed = [c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
    passed = [c_int64(a) if type(a) is int else c_void_p(None) if a is None else a for a in passed]
    return getattr(_LIBRARY, name)(*passed)


def packed_bytes(m: int, k: int, dtype: int) -> int:
    assert _LIBRARY is not None
    function = ctypes.CFUNCTYPE(c_int64, c_int64, c_int64, c_int)(
        ("dit_packed_bytes", _LIBRARY)  # a prototype of its own: int would cut the size
    )
    return function(m, k, dtype)


def aligned(size: int) -> Tensor:
    memory = torch.empty(size + 64, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    return memory[start : start + size]


def pack(weight: Tensor, threads: int = 1) -> Tensor:
    code = CODES[weight.dtype]
    packed = aligned(packed_bytes(*weight.shape, code)).fill_(0xFF)
    assert call("dit_pack_weight", weight, packed, *weight.shape, c_int(code), c_int(threads)) == 0
    return packed


def linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, m: int, gelu: bool = False, threads: int = 1
) -> Tensor:
    out = torch.full((len(x) * m + 1,), 7, dtype=x.dtype)
    code = call("dit_linear", x, packed, bias, out, *x.shape, m, c_int(CODES[x.dtype]), c_int(gelu),
                c_int(threads))  # fmt: skip
    assert code == 0 and out[-1] == 7  # nothing is written behind the last row
    return out[:-1].view(len(x), m)


def linear_int8(
    codes: Tensor, scales: Tensor, packed: Tensor, weight_scales: Tensor, bias: Tensor,
    dtype: torch.dtype, gelu: bool = False, threads: int = 1,
) -> Tensor:  # fmt: skip
    out = torch.empty(len(codes), len(bias), dtype=dtype)
    assert call("dit_linear_int8", codes, scales, packed, weight_scales, bias, out, *codes.shape,
                len(bias), c_int(CODES[dtype]), c_int(gelu), c_int(threads)) == 0  # fmt: skip
    return out


def random(rows: int, k: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * k + m)
    x = torch.randn(rows, k, generator=generator).to(dtype)
    weight = (torch.randn(m, k, generator=generator) * k**-0.5).to(dtype)
    return x, weight, torch.randn(m, generator=generator).to(dtype)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k", "m"), SHAPES)
def test_linear(rows: int, k: int, m: int, dtype: torch.dtype, gelu: bool) -> None:
    x, weight, bias = random(rows, k, m, dtype)
    exact, same = F.linear(x.double(), weight.double(), bias.double()), F.linear(x, weight, bias)
    if gelu:
        exact, same = (F.gelu(v, approximate="tanh") for v in (exact, same))
    actual = linear(x, pack(weight), bias.float(), m, gelu)
    assert_close_to_reference(actual, exact, same_dtype=same)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_small_size(dtype: torch.dtype) -> None:
    for rows in (1, 2, 9):
        for k in range(1, 10):
            for m in (1, 15, 16, 33, 49):
                x, weight, bias = random(rows, k, m, dtype)
                actual = linear(x, pack(weight), bias.float(), m)
                exact = F.linear(x.double(), weight.double(), bias.double())
                tolerance = 4 * torch.finfo(dtype).eps
                assert_close_to_reference(actual, exact, tolerance=tolerance)
                bare = F.linear(x.double(), weight.double())
                actual = linear(x, pack(weight), None, m)
                assert_close_to_reference(actual, bare, tolerance=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "m"), [(1152, 384), (2307, 97), (256, 256), (16, 2000)])
def test_a_row_depends_on_nothing_beside_it(k: int, m: int, dtype: torch.dtype) -> None:
    x, weight, bias = random(67, k, m, dtype)
    packed, wide = pack(weight), bias.float()
    assert torch.equal(packed, pack(weight, threads=3))
    whole = linear(x, packed, wide, m, gelu=True)
    for threads in (2, 3, 5):
        assert torch.equal(linear(x, packed, wide, m, True, threads), whole), threads
    for rows in (1, 2, 3, 5, 8, 13, 64):
        part = linear(x[:rows], packed, wide, m, True)
        assert torch.equal(part, whole[:rows]), rows
        rest = linear(x[rows:], packed, wide, m, True, threads=2)
        assert torch.equal(rest, whole[rows:]), rows


@pytest.mark.parametrize("k", [33, 34])  # bfloat16 rows that end within a step, and that do not
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_row(k: int, dtype: torch.dtype) -> None:
    x, weight, bias = random(11, k, 50, dtype)
    clean = linear(x, pack(weight), bias.float(), 50)
    x[5, 0], x[9, 0] = torch.nan, torch.inf
    actual = linear(x, pack(weight), bias.float(), 50)
    assert actual[5].isnan().all() and actual[9].isinf().all()
    others = [row for row in range(11) if row not in (5, 9)]
    assert torch.equal(actual[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_at_any_address(dtype: torch.dtype) -> None:
    x, weight, bias = random(20, 384, 96, dtype)
    moved = one_off(tuple(x.shape), dtype).copy_(x)
    packed = pack(weight)
    expected = linear(x, packed, bias.float(), 96)
    assert torch.equal(linear(moved, packed, bias.float(), 96), expected)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k", "m"), SHAPES)
def test_linear_int8(rows: int, k: int, m: int, dtype: torch.dtype, gelu: bool) -> None:
    generator = torch.Generator().manual_seed(rows + k + m)
    codes = torch.randint(1, 256, (rows, k), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)
    scales = torch.rand(rows, generator=generator) / 127
    weight_scales = torch.rand(m, generator=generator) / (127 * k**0.5)
    bias = torch.randn(m, generator=generator)
    whole = (codes.double() - 128) @ weight.double().T
    exact = whole * scales[:, None].double() * weight_scales.double() + bias.double()
    if gelu:
        exact = F.gelu(exact, approximate="tanh")
    packed = pack(weight)
    actual = linear_int8(codes, scales, packed, weight_scales, bias, dtype, gelu)
    assert_close_to_reference(actual, exact, tolerance=4 * torch.finfo(dtype).eps)
    again = linear_int8(codes, scales, packed, weight_scales, bias, dtype, gelu, threads=3)
    assert torch.equal(again, actual)


def test_int8_at_the_ends_of_its_range() -> None:
    k, ones = 65536, torch.ones(1)
    for code, weight in ((255, 127), (255, -128), (0, -128), (0, 127)):
        codes = torch.full((1, k), code, dtype=torch.uint8)
        packed = pack(torch.full((1, k), weight, dtype=torch.int8))
        actual = linear_int8(codes, ones, packed, ones, torch.zeros(1), torch.float32)
        assert actual.item() == (code - 128) * weight * k


def test_empty() -> None:
    x, weight, bias = random(0, 64, 32, torch.float32)
    assert linear(x, pack(weight), bias, 32).shape == (0, 32)
    assert packed_bytes(0, 64, 0) == 0


def test_what_is_refused() -> None:
    x, weight, bias = random(4, 64, 32, torch.float32)
    packed = pack(weight)
    out = torch.empty(4, 32)

    def code(pack_: Tensor | None = packed, rows: int = 4, k: int = 64, dtype: int = 0,
             threads: int = 1) -> int:  # fmt: skip
        return call("dit_linear", x, pack_, bias, out, rows, k, 32, c_int(dtype), c_int(0),
                    c_int(threads))  # fmt: skip

    assert code() == 0
    assert code(None) == -1
    assert code(rows=-1) == code(k=0) == code(rows=1 << 62) == -2
    assert code(dtype=2) == code(dtype=4) == code(dtype=-1) == -3
    assert code(threads=0) == -4
    assert code(packed[4:]) == -5
    assert (
        packed_bytes(-1, 4, 0) == packed_bytes(4, 0, 0) == packed_bytes(1 << 40, 1 << 40, 0) == -2
    )
    assert packed_bytes(4, 65537, 4) == -2
    assert packed_bytes(4, 4, 2) == -3
    assert _LIBRARY is not None
    _LIBRARY.dit_set_isa(native_library.ISAS.index("avx512"))
    try:
        assert code() == -6
    finally:
        _LIBRARY.dit_set_isa(native_library.ISAS.index(_LEVEL))
