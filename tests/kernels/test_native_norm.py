"""The native norm, modulation, residual and their int8 codes against float64."""

from __future__ import annotations

import pytest
import torch
from native_levels import DTYPES, TOKENS, WIDTHS, isa, needs_library, one_off, threads
from numerics import assert_close_to_reference
from torch import Tensor

from dit_kernels import reference
from dit_kernels.cpu import operators as native

pytestmark = needs_library
__all__ = ["isa", "threads"]  # fixtures
EPS = 1e-6


def inputs(
    n: int, t: int, d: int, dtype: torch.dtype, modulation_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x, y (N, T, D) and the strided views of a chunk(6) that modulate them."""
    generator = torch.Generator().manual_seed(n * t + d)
    x, y = (torch.randn(n, t, d, generator=generator) * 2 + 0.5 for _ in range(2))
    rows = torch.randn(n, 6 * d, generator=generator).to(modulation_dtype or dtype)
    gate, shift, scale = rows.chunk(6, dim=1)[1:4]
    return x.to(dtype), y.to(dtype), {"gate": gate, "shift": shift, "scale": scale}


def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def compare(name: str, cases: list[tuple], dtype: torch.dtype) -> None:
    """All rows of all cases together: twice the error of one row may be no error at all."""
    actual, exact, same = [], [], []
    for case in cases:
        exactly = [v.double() if isinstance(v, Tensor) else v for v in case]
        for into, values in (
            (actual, getattr(native, name)(*case)),
            (exact, getattr(reference, name)(*exactly)),
            (same, getattr(reference, name)(*case)),
        ):
            values = values if isinstance(values, tuple) else (values,)
            into.append(torch.cat([v.reshape(-1) for v in values]))
    assert all(v.dtype == dtype for v in actual)
    assert_close_to_reference(torch.cat(actual), torch.cat(exact), same_dtype=torch.cat(same))


@pytest.mark.parametrize("d", [*WIDTHS, 1, 3, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_float_results(isa: str, dtype: torch.dtype, d: int) -> None:
    made = [inputs(2, t, d, dtype) for t in TOKENS]
    cases = [(x, m["shift"], m["scale"], EPS) for x, _, m in made]
    compare("layernorm_modulate", cases, dtype)
    compare("gate_residual", [(x, y, m["gate"]) for x, y, m in made], dtype)
    cases = [(x, y, m["gate"], m["shift"], m["scale"], EPS) for x, y, m in made]
    compare("gate_residual_layernorm_modulate", cases, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_modulation_expanded_rows_and_mixed_dtypes(isa: str, dtype: torch.dtype) -> None:
    x, y, m = inputs(3, 5, 72, dtype, torch.float32)
    compare("layernorm_modulate", [(x, m["shift"], m["scale"], EPS)], dtype)
    same = {name: tensor[:1].expand(3, -1) for name, tensor in m.items()}
    compare("gate_residual", [(x, y, same["gate"].to(dtype)[:1].expand(3, -1))], dtype)
    mixed = (x, y, m["gate"].to(dtype), same["shift"], m["scale"], EPS)
    compare("gate_residual_layernorm_modulate", [mixed], dtype)


def test_the_norm_reads_the_rounded_residual(isa: str) -> None:
    x, y, m = inputs(2, 9, 96, torch.bfloat16)
    residual, normed = native.gate_residual_layernorm_modulate(x, y, **m, eps=EPS)
    assert torch.equal(residual, native.gate_residual(x, y, m["gate"]))
    assert torch.equal(normed, native.layernorm_modulate(residual, m["shift"], m["scale"], EPS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_may_be_an_argument_and_lie_anywhere(isa: str, dtype: torch.dtype) -> None:
    x, y, m = inputs(2, 7, 40, dtype)
    expected = native.gate_residual_layernorm_modulate(x, y, **m, eps=EPS)
    x_moved, y_moved = (one_off(x.shape, dtype).copy_(v) for v in (x, y))
    moved = {n: one_off(tuple(v.shape), dtype).copy_(v) for n, v in m.items()}
    out = (x_moved, y_moved)
    results = native.gate_residual_layernorm_modulate(x_moved, y_moved, **moved, eps=EPS, out=out)
    for actual, into, value in zip(results, out, expected, strict=True):
        assert actual is into
        assert torch.equal(actual, value)
    expected = native.layernorm_modulate(x, m["shift"], m["scale"], EPS)
    x_moved.copy_(x)
    assert native.layernorm_modulate(x_moved, m["shift"], m["scale"], EPS, out=x_moved) is x_moved
    assert torch.equal(x_moved, expected)


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [36, 384, 1152])
def test_codes(isa: str, dtype: torch.dtype, d: int, unsigned: bool) -> None:
    x, y, m = inputs(2, 19, d, dtype)
    code_dtype = torch.uint8 if unsigned else torch.int8
    modulation = {name: m[name] for name in ("shift", "scale")}
    exact = reference.layernorm_modulate(x.double(), **wide(modulation), eps=EPS)
    codes, scales = native.layernorm_modulate_quantize(x, **modulation, eps=EPS, dtype=code_dtype)
    assert_codes(codes, scales, exact, code_dtype)

    residual, codes, scales = native.gate_residual_layernorm_modulate_quantize(
        x, y, **m, eps=EPS, dtype=code_dtype
    )
    assert torch.equal(residual, native.gate_residual(x, y, m["gate"]))
    exact = reference.layernorm_modulate(residual.double(), **wide(modulation), eps=EPS)
    assert_codes(codes, scales, exact, code_dtype)

    codes, scales = native.quantize_rows(x, code_dtype)
    assert_codes(codes, scales, x.double(), code_dtype)


def assert_codes(codes: Tensor, scales: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Half a step from the exact values, up to the float32 that they were computed in."""
    assert codes.dtype == dtype
    whole = codes.double() - (128 if dtype == torch.uint8 else 0)
    assert whole.abs().max() <= 127
    torch.testing.assert_close(scales.double(), exact.abs().amax(-1) / 127, rtol=1e-5, atol=0)
    steps = whole - exact / scales.double().unsqueeze(-1)
    assert steps.abs().max() <= 0.501


def test_codes_of_zeros_and_of_values_that_are_not_finite(isa: str) -> None:
    x = torch.zeros(5, 40)
    x[1, 7], x[2, 3], x[3, 39] = torch.nan, torch.inf, -torch.inf
    x[4, 0] = 2
    codes, scales = native.quantize_rows(x)
    assert not codes[0].any() and not codes[1].any() and not codes[2].any()
    assert torch.equal(codes[4], torch.tensor([127] + [0] * 39, dtype=torch.int8))
    assert scales[0] > 0 and scales[1].isnan() and scales[2].isinf() and scales[3].isinf()
    _, expected = reference.quantize_rows(x, torch.int8)
    torch.testing.assert_close(scales, expected, equal_nan=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite(isa: str, dtype: torch.dtype, value: float) -> None:
    x, y, m = inputs(2, 4, 45, dtype)
    x[0, 1, 44] = value
    y[1, 2, 3] = value
    actual = native.gate_residual_layernorm_modulate(x, y, **m, eps=EPS)
    expected = reference.gate_residual_layernorm_modulate(x, y, **m, eps=EPS)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.isinf(), b.isinf())
        assert a[0, 1].isnan().any() or a[0, 1].isinf().any()
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02, equal_nan=True)


def test_any_number_of_threads_gives_the_same(isa: str, threads: int) -> None:
    x, y, m = inputs(3, 50, 1152, torch.bfloat16)
    residual, normed = native.gate_residual_layernorm_modulate(x, y, **m, eps=EPS)
    for image in range(3):
        part = {name: tensor[image : image + 1] for name, tensor in m.items()}
        alone = native.gate_residual_layernorm_modulate(
            x[image : image + 1], y[image : image + 1], **part, eps=EPS
        )
        assert torch.equal(alone[0][0], residual[image])
        assert torch.equal(alone[1][0], normed[image])


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(isa: str, dtype: torch.dtype) -> None:
    for n, t in ((0, 7),):
        x, y, m = inputs(n, t, 32, dtype)
        modulation = {name: m[name] for name in ("shift", "scale")}
        assert native.layernorm_modulate(x, **modulation, eps=EPS).shape == (n, t, 32)
        assert native.gate_residual(x, y, m["gate"]).shape == (n, t, 32)
        codes, scales = native.layernorm_modulate_quantize(x, **modulation, eps=EPS)
        assert (codes.shape, scales.shape) == ((n, t, 32), (n, t))


@needs_library
@pytest.mark.parametrize("eps", [1e-6, 1e-3, 1.0])
def test_eps_is_the_one_that_is_given(isa: str, eps: float) -> None:
    """Rows of little variance: mean 0 and 1/16² by construction, so that eps decides."""
    x = (torch.tensor([1.0, -1.0]).repeat(24) / 16).expand(1, 3, 48).contiguous()
    zero = torch.zeros(1, 48)
    expected = x.double() / (1 / 256 + eps) ** 0.5
    normed = native.layernorm_modulate(x, zero, zero, eps)
    torch.testing.assert_close(normed.double(), expected, rtol=1e-6, atol=0)
    _, normed = native.gate_residual_layernorm_modulate(x, x, zero, zero, zero, eps)
    torch.testing.assert_close(normed.double(), expected, rtol=1e-6, atol=0)
    codes, scales = native.layernorm_modulate_quantize(x, zero, zero, eps)
    near = codes.double() * scales.double().unsqueeze(-1)
    torch.testing.assert_close(near, expected, rtol=1e-5, atol=0)  # the greatest: code ±127
