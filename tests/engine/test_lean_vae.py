"""The lean decoder against `AutoencoderKL.decode`, which is the definition of correct."""

from __future__ import annotations

import copy
import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launches import Launches
from numerics import assert_close_to_reference
from tiny import tiny_vae
from torch import Tensor

from dit_engine.backends.lean import vae, vae_layers
from dit_engine.backends.lean.vae import LARGEST_BATCH, LeanDecoder
from dit_engine.vae import AutoencoderKL, VAEConfig
from dit_kernels import dispatch

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


def test_inputs_are_not_changed_and_weights_are_copies() -> None:
    vae = tiny_vae()
    z = latents(vae, 2, 8, 8).contiguous(memory_format=torch.channels_last)
    kept, decoder = z.clone(), LeanDecoder(vae, torch.float32, "cpu")
    images = decoder(z)
    assert torch.equal(z, kept)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
    assert torch.equal(decoder(z), images)


@pytest.mark.parametrize(("config", "shape"), [*SHAPES[:2], *SHAPES[3:6]])
@pytest.mark.parametrize("gpu", [False, True])
def test_without_onednn(
    config: VAEConfig, shape: tuple[int, int, int], gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With plain convolutions; also as on a GPU, where the norms add biases and residuals."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    if gpu:
        monkeypatch.setattr(vae_layers, "leaves_sums", lambda device: True)
        monkeypatch.setattr(vae, "leaves_sums", lambda device: True)
        monkeypatch.setattr(vae_layers, "LARGEST_SCORES", 40)  # of 64, 35 and 15 tokens
        monkeypatch.setattr(dispatch, "chosen", lambda *_: "reference")
    model = random_vae(config)
    check_both_precisions(model, latents(model, *shape))


def test_launches_of_a_decode_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stable Diffusion's decoder on meta tensors. Each of its 30 norms is two launches, see
    `dit_kernels.triton.groupnorm_silu`."""
    norms = list[dict[str, Any]]()

    def norm(x: Tensor, *affine: Any, out: Tensor | None = None, **options: Any) -> Tensor:
        norms.append(options)
        return torch.empty_like(x) if out is None else out

    def softmax(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        launches.counted("softmax")
        return torch.empty_like(scores, dtype=dtype)

    def as_by_cudnn(convolution: Any, x: Tensor, *given: Any, **options: Any) -> Tensor:
        assert x.is_contiguous(memory_format=torch.channels_last)
        made = convolution(x, *given, **options)
        return torch.empty_like(made, memory_format=torch.channels_last)

    def add_shift(x: Tensor, y: Tensor, shift: Tensor) -> Tensor:
        launches.counted("add_shift")
        return x

    triton = {"groupnorm_silu": norm, "softmax": softmax, "add_shift": add_shift}
    monkeypatch.setattr(vae_layers, "launcher", lambda name, device: triton[name])
    for name in ("conv2d", "conv_transpose2d"):
        monkeypatch.setattr(F, name, partial(as_by_cudnn, getattr(F, name)))
    with torch.device("meta"):
        vae, z = AutoencoderKL(VAEConfig()), torch.empty(1, 4, 32, 32)
    decoder = LeanDecoder(vae.to_empty(device="cpu"), torch.bfloat16, "meta")
    with Launches() as launches:
        assert decoder(z).shape == (1, 3, 256, 256)
    assert launches.outside == {
        "_to_copy": 1,  # the latents as bfloat16
        "convolution": 2 * 14 + 2 + 3,
        "addmm": 1 + 2 + 2,  # after the quantisation, shortcuts, attention
        "bmm": 2,
        "softmax": 1,
        "add_shift": 3,  # before each upsampling
        "add": 1,  # the last bias, with the conversion to float32
    }
    assert len(norms) == 2 * 14 + 1 + 1
    assert launches.outside.total() + 2 * len(norms) == 106
    assert sum("add" in options for options in norms) == 12  # of residual blocks and attention


def test_batches_on_a_gpu_have_few_sizes() -> None:
    decoder = LeanDecoder(AutoencoderKL(SINGLE), torch.bfloat16, "meta")
    assert decoder._batches(32, 32 * 32) == [LARGEST_BATCH] * 4
    assert decoder._batches(15, 64 * 64) == [8, 4, 2, 1]
    assert decoder._batches(3, 128 * 128) == [2, 1] and decoder._batches(2, 256 * 256) == [1, 1]
    assert decoder(torch.empty(0, 4, 8, 8)).shape == (0, 3, 8, 8)


def test_nan_stays_in_its_image_and_wrong_inputs_are_refused() -> None:
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
