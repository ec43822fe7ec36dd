"""groupnorm_silu and guided_step under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from operator_checks import check, check_special, launcher, random
from torch import Tensor
from triton_workers import interpreted

from dit_kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _images(n: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    x = random(n, channels, height, width) + random(channels, seed=1)[:, None, None]
    return x.to(dtype, memory_format=torch.channels_last)


def _affine(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return random(channels, dtype=dtype, seed=2), random(channels, dtype=dtype, seed=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "groups"), [(128, 32), (512, 32), (96, 32), (96, 8), (20, 5)])
@interpreted
def test_groupnorm_silu(channels, groups, dtype):
    check("groupnorm_silu", _images(2, channels, 7, 9, dtype), groups, *_affine(channels, dtype),
          1e-6)  # fmt: skip


@pytest.mark.parametrize(("height", "width"), [(1, 1), (64, 48)])
@interpreted
def test_groupnorm_silu_of_other_sizes(height, width):
    x = _images(1, 64, height, width, torch.bfloat16)
    check("groupnorm_silu", x, 32, *_affine(64, torch.float32), 1e-6)


@interpreted
def test_groupnorm_silu_of_several_tiles_a_chunk():
    from unittest.mock import patch

    with patch("dit_kernels.triton.groupnorm_silu._CHUNKS", 3):
        check("groupnorm_silu", _images(1, 128, 19, 17, torch.float32), 32,
              *_affine(128, torch.float32), 1e-6)  # fmt: skip


@interpreted
def test_groupnorm_silu_far_from_zero():
    x = (random(1, 32, 16, 16) + 1000).to(memory_format=torch.channels_last)
    check("groupnorm_silu", x, 8, *_affine(32, torch.float32), 1e-6)


@interpreted
def test_groupnorm_silu_in_place_empty_and_special():
    x, affine = _images(2, 64, 5, 5, torch.float32), _affine(64, torch.float32)
    assert launcher("groupnorm_silu")(x[:0], 32, *affine, 1e-6).shape == (0, 64, 5, 5)
    expected = reference.groupnorm_silu(x, 32, *affine, 1e-6)
    given = x.clone()
    assert launcher("groupnorm_silu")(given, 32, *affine, 1e-6, out=given) is given
    torch.testing.assert_close(given, expected)
    assert launcher("groupnorm_silu")(x, 32, *affine, 1e-6).is_contiguous(
        memory_format=torch.channels_last
    )
    x[0, 3, 2, 2], x[1, 10, 0, 0] = float("nan"), float("inf")
    check_special("groupnorm_silu", x, 32, *affine, 1e-6)


def _step(n, rows, out_channels, side, patch, dtype=torch.float32):
    tokens = random(rows, (side // patch) ** 2, patch * patch * out_channels, dtype=dtype)
    z, before, noise = (random(n, 4, side, side, seed=s) for s in (1, 2, 3))
    scale = torch.tensor([1.0, 4.0, 7.5, 1.5])[:n]
    coefficients = random(9, seed=4)
    coefficients[6:8] = torch.tensor([-3.0, -1.0])
    return tokens, z, before, noise, scale, coefficients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_channels", [4, 8])
@pytest.mark.parametrize("guided", [False, True])
@interpreted
def test_guided_step(guided, out_channels, dtype):
    arguments = _step(3, 6 if guided else 3, out_channels, 8, 2, dtype)
    check("guided_step", *arguments, 3, 2)


@pytest.mark.parametrize(("side", "patch"), [(32, 2), (8, 4), (8, 8), (6, 1), (10, 2)])
@pytest.mark.parametrize("guided_channels", [1, 4])
@interpreted
def test_guided_step_of_other_sizes(side, patch, guided_channels):
    check("guided_step", *_step(2, 4, 8, side, patch), guided_channels, patch)


@pytest.mark.parametrize("out_channels", [4, 8])
@interpreted
def test_guided_step_without_noise_reads_none(out_channels):
    tokens, z, before, noise, scale, coefficients = _step(2, 4, out_channels, 8, 2)
    noise.fill_(float("nan"))
    coefficients[8] = 0
    check("guided_step", tokens, z, before, noise, scale, coefficients, 3, 2)


@interpreted
def test_guided_step_at_scale_one_ignores_the_unconditional_rows():
    tokens, z, before, noise, scale, coefficients = _step(2, 4, 8, 8, 2)
    tokens[2] = float("nan")  # image 0 is at scale 1
    check("guided_step", tokens, z, before, noise, scale, coefficients, 3, 2)


@interpreted
def test_guided_step_in_place_empty_and_special():
    tokens, z, before, noise, scale, coefficients = _step(2, 4, 8, 8, 2)
    run, constants = launcher("guided_step"), (scale, coefficients, 3, 2)
    expected = run(tokens, z, before, noise, *constants)
    given = z.clone(), before.clone()
    assert run(tokens, *given, noise, *constants, out=given)[0] is given[0]
    torch.testing.assert_close(given, expected, rtol=0, atol=0)
    empty = run(tokens[:0], z[:0], before[:0], noise[:0], scale[:0], coefficients, 3, 2)
    assert [r.shape for r in empty] == [(0, 4, 8, 8)] * 2
    tokens[1, 3, 5], z[0, 1, 2, 3] = float("nan"), float("inf")
    check_special("guided_step", tokens, z, before, noise, *constants)
