"""Both attention kernels under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from operator_checks import check, check_special, launcher, random
from triton_workers import interpreted

VARIANTS = ["attention", "attention_tma"]


def _check(variant: str, n: int, tokens: int, heads: int, d: int, dtype: torch.dtype) -> None:
    qkv = random(n, tokens, 3 * heads * d, dtype=dtype)
    check(variant, qkv, heads, like="attention")


@pytest.mark.parametrize("d", [64, 72])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@interpreted
def test_published_head_dims(variant, d, dtype):
    _check(variant, 2, 128, 2, d, dtype)


@pytest.mark.parametrize("d", [64, 72])
@interpreted
def test_float32(d):
    _check("attention", 1, 128, 2, d, torch.float32)


@pytest.mark.parametrize("tokens", [1, 16, 37, 130])
@pytest.mark.parametrize("variant", VARIANTS)
@interpreted
def test_ragged_tokens(variant, tokens):
    _check(variant, 2, tokens, 2, 72, torch.float16)
    _check("attention", 1, tokens, 2, 72, torch.float32)


@pytest.mark.parametrize("d", [8, 16, 24, 32, 40, 48, 80, 96, 104, 128])
@pytest.mark.parametrize("variant", VARIANTS)
@interpreted
def test_other_head_dims(variant, d):
    _check(variant, 1, 20, 3, d, torch.bfloat16)


@pytest.mark.parametrize("variant", VARIANTS)
@interpreted
def test_an_image_of_256_pixels(variant):
    _check(variant, 1, 256, 1, 72, torch.bfloat16)


@pytest.mark.parametrize("variant", VARIANTS)
@interpreted
def test_large_scores(variant):
    qkv = random(1, 40, 3 * 64, dtype=torch.float16)
    qkv[..., :128] *= 30
    check(variant, qkv, 1, like="attention")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
@interpreted
def test_nan_and_infinity_stay_in_their_head_and_image(variant, part, special):
    qkv = random(2, 70, 3, 2, 72, dtype=torch.float16)
    qkv[0, 66, part, 1, 2] = special
    check_special(variant, qkv.view(2, 70, -1), 2, like="attention")


@interpreted
def test_keys_that_are_all_impossible_at_first():
    qkv = torch.ones(1, 70, 3, 1, 64)
    qkv[:, :65, 1] = float("-inf")
    check_special("attention", qkv.view(1, 70, -1), 1)


@pytest.mark.parametrize("variant", VARIANTS)
@interpreted
def test_nothing_to_do_and_given_buffer(variant):
    run = launcher(variant)
    assert run(torch.zeros(0, 16, 192, dtype=torch.float16), 1).shape == (0, 16, 64)
    qkv = random(1, 16, 192, dtype=torch.float16)
    out = torch.empty(1, 16, 64, dtype=torch.float16)
    assert run(qkv, 1, out=out) is out
    assert torch.equal(out, run(qkv, 1))


@interpreted
def test_the_descriptor_variant_by_its_public_name():
    import dit_kernels

    qkv = random(2, 37, 3 * 144, dtype=torch.bfloat16)
    found = dit_kernels.attention(qkv, 2, impl="triton-tma")
    assert torch.equal(found, launcher("attention_tma")(qkv, 2))
    with pytest.raises(dit_kernels.Unavailable, match=r"^impl 'triton-tma': dtype torch\.float32"):
        dit_kernels.attention(torch.zeros(1, 16, 192), 1, impl="triton-tma")
    misaligned = torch.zeros(16 * 192 + 1, dtype=torch.float16)[1:].view(1, 16, 192)
    with pytest.raises(dit_kernels.Unavailable, match=r"'triton-tma': .* multiple of 16 bytes"):
        dit_kernels.attention(misaligned, 1, impl="triton-tma")


@interpreted
def test_tiles_follow_the_number_of_programs():
    from dit_kernels.triton.attention import attention_tiles

    few, many = (attention_tiles(256, n * 16, 72, torch.bfloat16, 9, 132) for n in (2, 16))
    assert (few.queries, many.queries) == (64, 128)
    assert few.keys == many.keys  # so that an image's rounding does not depend on its batch
    assert attention_tiles(16, 8, 32, torch.bfloat16, 9, 132).queries == 16
