"""The lean decoder against `AutoencoderKL.decode`, which is the definition of correct."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from numerics import assert_close_to_reference
from tiny import tiny_vae
from torch import Tensor

from dit_engine.backends.lean.vae import LeanDecoder
from dit_engine.vae import AutoencoderKL, VAEConfig

BUILTIN = VAEConfig(block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=8,
                    mid_block_add_attention=False)  # fmt: skip
ODD = VAEConfig(block_out_channels=(24, 40), layers_per_block=2, norm_num_groups=8,
                latent_channels=6, out_channels=1)  # fmt: skip
# Wider than `FLOAT32_CHAIN`, as Stable Diffusion's.
WIDE = VAEConfig(block_out_channels=(256,), layers_per_block=1)
SINGLE = VAEConfig(block_out_channels=(16,), layers_per_block=1, norm_num_groups=4)


def random_vae(config: VAEConfig, seed: int = 0) -> AutoencoderKL:
    """Norms of their own too: weight 1 and bias 0 would hide what they do."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(config).eval()
    for name, parameter in vae.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return vae


def latents(vae: AutoencoderKL, n: int, h: int, w: int) -> Tensor:
    generator = torch.Generator().manual_seed(n + h + w)
    return torch.randn(n, vae.config.latent_channels, h, w, generator=generator)


@torch.no_grad()
def check_both_precisions(vae: AutoencoderKL, z: Tensor) -> None:
    exact = copy.deepcopy(vae).double().decode(z.double())
    lean = LeanDecoder(vae, torch.float32, "cpu")(z)
    assert lean.dtype == torch.float32 and lean.is_contiguous()
    assert_close_to_reference(lean, vae.decode(z), tolerance=1e-5)
    if z.shape[2] * z.shape[3] < 15:
        return  # group norms over so few pixels turn any bfloat16 rounding into anything
    half = LeanDecoder(vae, torch.bfloat16, "cpu")(z)
    assert half.dtype == torch.float32
    eager = copy.deepcopy(vae).bfloat16().decode(z.bfloat16())
    assert_close_to_reference(half, exact, same_dtype=eager.float())


SHAPES = [
    (tiny_vae().config, (1, 8, 8)),
    (tiny_vae().config, (3, 5, 7)),  # odd sides, several images
    (tiny_vae().config, (1, 1, 3)),  # fewer rows than a convolution has taps
    (BUILTIN, (2, 8, 8)),
    (ODD, (2, 3, 5)),
    (SINGLE, (2, 3, 5)),
    (WIDE, (1, 8, 8)),
]


@pytest.mark.parametrize(("config", "shape"), SHAPES)
def test_equals_the_reference(config: VAEConfig, shape: tuple[int, int, int]) -> None:
    vae = random_vae(config)
    check_both_precisions(vae, latents(vae, *shape))


def test_float32_bits_do_not_depend_on_the_batch() -> None:
    vae = random_vae(tiny_vae().config)
    decoder = LeanDecoder(vae, torch.float32, "cpu")
    z = latents(vae, 3, 8, 8)
    together = decoder(z)
    for i in range(3):
        assert torch.equal(together[i : i + 1], decoder(z[i : i + 1]))
    wide = torch.zeros(3, 4, 9, 16, dtype=torch.float64)  # other strides, another dtype
    wide[:, :, 1:, ::2] = z
    assert torch.equal(together, decoder(wide[:, :, 1:, ::2]))


def test_inputs_stay_and_the_weights_are_its_own() -> None:
    vae = tiny_vae()
    z = latents(vae, 2, 8, 8).contiguous(memory_format=torch.channels_last)
    kept, decoder = z.clone(), LeanDecoder(vae, torch.float32, "cpu")
    images = decoder(z)
    assert torch.equal(z, kept)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
    assert torch.equal(decoder(z), images)


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of other devices, through plain convolutions."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    vae = random_vae(BUILTIN)
    check_both_precisions(vae, latents(vae, 2, 5, 7))


def test_nan_stays_in_its_image_and_what_is_refused() -> None:
    vae = tiny_vae()
    z = latents(vae, 2, 8, 8)
    z[0, 0, 0, 0] = torch.nan
    images = LeanDecoder(vae, torch.bfloat16, "cpu")(z)
    assert images[0].isnan().all() and images[1].isfinite().all()
    decoder = LeanDecoder(vae, torch.float32, "cpu")
    assert decoder(torch.empty(0, 4, 8, 6)).shape == (0, 3, 16, 12)
    for shape in ((1, 3, 8, 8), (4, 8, 8), (1, 4, 0, 8)):
        with pytest.raises(ValueError, match=rf"z has shape {re.escape(str(shape))}"):
            decoder(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"dtype torch\.float64: choose one of float32, bfloat16"):
        LeanDecoder(tiny_vae(), torch.float64, "cpu")
