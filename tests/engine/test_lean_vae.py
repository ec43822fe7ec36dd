"""The lean decoder against `AutoencoderKL.decode`, which is the definition of correct."""

from __future__ import annotations

import copy
import re
from types import MethodType

import pytest
import torch
from numerics import assert_close_to_reference
from tiny import tiny_vae
from torch import Tensor

from dit_engine.backends.lean import vae as lean_vae
from dit_engine.backends.lean.vae import LeanDecoder
from dit_engine.vae import AutoencoderKL, VAEConfig

BUILTIN = VAEConfig(block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=8,
                    mid_block_add_attention=False)  # fmt: skip
ODD = VAEConfig(block_out_channels=(24, 40), layers_per_block=2, norm_num_groups=8,
                latent_channels=6, out_channels=1)  # fmt: skip
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
    (VAEConfig(), (1, 8, 8)),  # Stable Diffusion's
]


@pytest.mark.parametrize(("config", "shape"), SHAPES)
def test_equals_the_reference(config: VAEConfig, shape: tuple[int, int, int]) -> None:
    vae = random_vae(config)
    check_both_precisions(vae, latents(vae, *shape))


def test_strided_latents_of_another_dtype() -> None:
    vae = tiny_vae()
    z = latents(vae, 2, 6, 6).double()[:, :, 1:, ::2]
    decoder = LeanDecoder(vae, torch.float32, "cpu")
    assert torch.equal(decoder(z), decoder(z.float().contiguous()))


@pytest.mark.parametrize("config", [BUILTIN, tiny_vae().config], ids=["builtin", "tiny"])
def test_float32_bits_do_not_depend_on_the_batch(config: VAEConfig) -> None:
    vae = random_vae(config)
    decoder = LeanDecoder(vae, torch.float32, "cpu")
    z = latents(vae, 3, 8, 8)
    together = decoder(z)
    for i in range(3):
        assert torch.equal(together[i : i + 1], decoder(z[i : i + 1]))
    assert torch.equal(together, decoder(z))


def test_inputs_and_weights_stay_as_they_are() -> None:
    vae = tiny_vae()
    before = copy.deepcopy(vae.state_dict())
    z = latents(vae, 2, 8, 8).contiguous(memory_format=torch.channels_last)
    kept = z.clone()
    decoder = LeanDecoder(vae, torch.float32, "cpu")
    images = decoder(z)
    assert torch.equal(z, kept)
    for name, value in vae.state_dict().items():
        assert torch.equal(value, before[name])
    # and the other way round: the decoder's weights are its own
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
    assert torch.equal(decoder(z), images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [VAEConfig(), BUILTIN], ids=["stable_diffusion", "builtin"])
def test_one_copy_of_the_weights(config: VAEConfig, dtype: torch.dtype) -> None:
    vae = random_vae(config)
    parts = (vae.decoder, vae.post_quant_conv)
    elements = sum(p.numel() for part in parts for p in part.parameters())
    summed_taps = sum(
        (16 - 9) * c * c for c in config.block_out_channels[1:]
    )  # 4×4 of the upsamplers for 3×3
    decoder = LeanDecoder(vae, dtype, "cpu")
    held = list(held_tensors(decoder))
    assert not any(isinstance(t, torch.nn.Parameter) for t in held)
    vectors = sum(p.numel() for part in parts for p in part.parameters() if p.ndim == 1)
    # Weights once, biases and norms in float32 at most; narrow layers are padded when packed.
    needed = (elements + summed_taps - vectors) * dtype.itemsize
    held_bytes = sum(t.numel() * t.element_size() for t in held)
    assert needed <= held_bytes <= needed + 4 * vectors + 4096


def held_tensors(root: object) -> list[Tensor]:
    """Every tensor that ``root`` keeps alive through attributes, bound methods and containers."""
    seen: dict[int, object] = {}
    tensors, queue = [], [root]
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, Tensor):
            tensors.append(item)
        elif isinstance(item, list | tuple):
            queue += item
        elif isinstance(item, MethodType):
            queue.append(item.__self__)
        elif type(item).__module__.startswith(("dit_engine.", "dit_kernels.")):
            queue += vars(item).values()
    return tensors


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of other devices, through plain convolutions."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    vae = random_vae(BUILTIN)
    check_both_precisions(vae, latents(vae, 2, 5, 7))


@pytest.mark.parametrize("over", [False, True])
def test_a_norm_takes_any_memory_format(over: bool) -> None:
    """cuDNN may answer a channels-last convolution in contiguous memory."""
    layer = random_vae(BUILTIN).decoder.conv_norm_out
    norm = lean_vae._Norm(layer, torch.device("cpu"))
    x = torch.randn(2, 32, 5, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.nn.functional.silu(layer(x))
        result = (norm.over if over else norm)(x)
        assert_close_to_reference(result, expected, tolerance=1e-5)
        last = x.contiguous(memory_format=torch.channels_last)
        assert (norm.over(last) is last) and torch.equal(last, result)  # no copy of it


def test_nan_stays_in_its_image() -> None:
    vae = tiny_vae()
    z = latents(vae, 2, 8, 8)
    z[0, 0, 0, 0] = torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        images = LeanDecoder(vae, dtype, "cpu")(z)
        assert images[0].isnan().all() and images[1].isfinite().all()


def test_empty_batch_and_what_is_refused() -> None:
    decoder = LeanDecoder(tiny_vae(), torch.float32, "cpu")
    images = decoder(torch.empty(0, 4, 8, 6))
    assert images.shape == (0, 3, 16, 12) and images.dtype == torch.float32
    for shape in ((1, 3, 8, 8), (4, 8, 8), (1, 4, 0, 8)):
        with pytest.raises(ValueError, match=rf"z has shape {re.escape(str(shape))}"):
            decoder(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"dtype torch\.float64: choose one of float32, bfloat16"):
        LeanDecoder(tiny_vae(), torch.float64, "cpu")
