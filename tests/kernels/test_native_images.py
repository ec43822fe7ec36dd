"""The native group norm and guided step against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from native_levels import DTYPES, isa, needs_library, one_off, threads
from numerics import assert_close_to_reference
from torch import Tensor

from dit_kernels import reference
from dit_kernels.cpu import operators as native

pytestmark = needs_library
__all__ = ["isa", "threads"]  # fixtures


def images(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.5) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(sum(shape))
    x = (torch.randn(shape, generator=generator) * 2 + mean).to(dtype)
    weight, bias = torch.randn(2, shape[1], generator=generator)
    return x.to(memory_format=torch.channels_last), weight, bias


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), [
    ((2, 128, 16, 16), 32), ((1, 512, 8, 8), 32), ((2, 36, 33, 31), 4), ((1, 6, 5, 3), 1),
    ((1, 4, 1, 1), 2), ((1, 32, 96, 97), 8),
])  # fmt: skip
def test_groupnorm(
    isa: str, dtype: torch.dtype, shape: tuple[int, ...], groups: int, silu: bool
) -> None:
    x, weight, bias = images(shape, dtype)
    for w, b in ((weight, bias), (weight.to(dtype), bias.to(dtype))):
        actual = native.groupnorm_silu(x, groups, w, b, 1e-6, silu=silu)
        assert actual.is_contiguous(memory_format=torch.channels_last)
        exact = F.group_norm(x.double(), groups, w.double(), b.double(), 1e-6)
        same = F.group_norm(x.float(), groups, w.float(), b.float(), 1e-6)
        if silu:
            exact, same = F.silu(exact), F.silu(same)
        assert_close_to_reference(actual, exact, same_dtype=same.to(dtype))
    moved = one_off((shape[0], shape[2], shape[3], shape[1]), dtype).permute(0, 3, 1, 2).copy_(x)
    expected = native.groupnorm_silu(x, groups, weight, bias, 1e-6, silu=silu)
    assert native.groupnorm_silu(moved, groups, weight, bias, 1e-6, silu=silu, out=moved) is moved
    assert torch.equal(moved, expected)


def test_groupnorm_of_a_mean_far_above_the_deviation(isa: str) -> None:
    x, weight, bias = images((1, 32, 64, 64), torch.float32, mean=1000.0)
    exact = reference.groupnorm_silu(x.double(), 8, weight.double(), bias.double(), 1e-6)
    actual = native.groupnorm_silu(x, 8, weight, bias, 1e-6)
    assert_close_to_reference(
        actual, exact, same_dtype=reference.groupnorm_silu(x, 8, weight, bias, 1e-6)
    )
    assert_close_to_reference(actual, exact, tolerance=1e-4)


def test_groupnorm_is_the_same_on_any_number_of_threads(isa: str, threads: int) -> None:
    x, weight, bias = images((2, 64, 48, 48), torch.bfloat16)
    both = native.groupnorm_silu(x, 16, weight, bias, 1e-6)
    for image in range(2):
        torch.set_num_threads(1)
        alone = native.groupnorm_silu(x[image : image + 1], 16, weight, bias, 1e-6)
        assert torch.equal(alone[0], both[image])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groupnorm_of_values_that_are_not_finite(
    isa: str, dtype: torch.dtype, value: float
) -> None:
    x, weight, bias = images((2, 24, 9, 9), dtype)
    x[1, 5, 8, 8] = value
    actual = native.groupnorm_silu(x, 4, weight, bias, 1e-6)
    expected = reference.groupnorm_silu(x, 4, weight, bias, 1e-6)
    assert actual[1, :6].isnan().all()
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02, equal_nan=True)


def test_groupnorm_of_nothing(isa: str) -> None:
    x, weight, bias = images((0, 32, 4, 4), torch.float32)
    assert native.groupnorm_silu(x, 8, weight, bias, 1e-6).shape == (0, 32, 4, 4)


def step_inputs(
    n: int, m: int, c: int, c_out: int, s: int, p: int, dtype: torch.dtype
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n + c_out + s)
    tokens = torch.randn(m, (s // p) ** 2, p * p * c_out, generator=generator).to(dtype)
    latents = [torch.randn(n, c, s, s, generator=generator) for _ in range(3)]
    scale = torch.tensor([4.0, 1.0, 0.0, 7.5][:n])
    coefficients = torch.tensor([1.1, -0.4, 0.5, 0.4, 0.1, -0.2, -5.0, -2.0, 0.8])
    return [tokens, *latents, scale, coefficients]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(("s", "p"), [(32, 2), (8, 8), (12, 4), (3, 1)])
def test_guided_step(
    isa: str, threads: int, dtype: torch.dtype, guided: bool, learned: bool, s: int, p: int
) -> None:
    n, c = 3, 4
    arguments = step_inputs(n, 2 * n if guided else n, c, c * (1 + learned), s, p, dtype)
    for channels in (3, 4):
        actual = native.guided_step(*arguments, channels, p)
        same = reference.guided_step(*arguments, channels, p)
        exact = reference.guided_step(*(v.double() for v in arguments), channels, p)
        assert_close_to_reference(torch.cat(actual), torch.cat(exact), same_dtype=torch.cat(same))
        out = (arguments[1].clone(), arguments[2].clone())
        in_place = native.guided_step(
            arguments[0], out[0], out[1], *arguments[3:], channels, p, out=out
        )
        assert torch.equal(in_place[0], actual[0]) and torch.equal(out[1], actual[1])


def test_guided_step_without_a_deviation_leaves_the_noise_out(isa: str) -> None:
    arguments = step_inputs(2, 4, 4, 8, 8, 2, torch.float32)
    arguments[5][-1] = 0
    arguments[3].fill_(torch.nan)
    z, _ = native.guided_step(*arguments, 3, 2)
    expected, _ = reference.guided_step(*arguments, 3, 2)
    assert not z.isnan().any()
    torch.testing.assert_close(z, expected)


def test_guided_step_of_nothing(isa: str) -> None:
    z, x0 = native.guided_step(*step_inputs(0, 0, 4, 8, 8, 2, torch.float32), 3, 2)
    assert z.shape == x0.shape == (0, 4, 8, 8)


@needs_library
def test_rows_of_scale_1_have_the_bits_of_rows_without_guidance(isa: str) -> None:
    """without + 1 · (with − without) would round, and make NaN of a half that is not finite."""
    g = torch.Generator().manual_seed(0)
    n, c, s, p = 2, 4, 8, 2
    tokens = torch.randn(2 * n, (s // p) ** 2, p * p * c, generator=g)
    tokens[n + 1] *= 1e4  # where the rounding shows
    tokens[n + 1, 0] = float("inf")
    z, before, noise = torch.randn(3, n, c, s, s, generator=g)
    coefficients = torch.randn(9, generator=g)
    scales = torch.tensor([4.0, 1.0])
    guided = native.guided_step(tokens, z, before, noise, scales, coefficients, c, p)
    alone = native.guided_step(
        tokens[:n].contiguous(), z, before, noise, scales, coefficients, c, p
    )
    for with_guidance, without in zip(guided, alone, strict=True):
        assert torch.equal(with_guidance[1], without[1])
        assert not torch.equal(with_guidance[0], without[0])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "c", "s", "d"), [(2, 4, 16, 384), (4, 3, 12, 36), (8, 4, 16, 1152)])
def test_embed(isa: str, threads: int, dtype: torch.dtype, p: int, c: int, s: int, d: int) -> None:
    g = torch.Generator().manual_seed(p)
    z = torch.randn(3, c, s, s, generator=g)
    kernel, bias = torch.randn(d, c, p, p, generator=g), torch.randn(d, generator=g)
    positions = torch.randn((s // p) ** 2, d, generator=g)
    weight = kernel.flatten(1).t().contiguous()
    wide = F.conv2d(z.double(), kernel.double(), bias.double(), stride=p)
    exact = wide.flatten(2).transpose(1, 2) + positions
    out = torch.empty(exact.shape, dtype=dtype)
    assert native.embed(z, weight, bias, positions, p, out=out) is out
    step = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert ((out.double() - exact).abs() <= step * exact.abs() + 1e-4).all()
    with pytest.raises(ValueError, match="positions is"):
        native.embed(z, weight, bias, positions[1:], p)
