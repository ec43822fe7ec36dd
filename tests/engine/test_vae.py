"""AutoencoderKL against diffusers' with random weights, through `load_checkpoint`."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import assert_close_to_reference
from safetensors.torch import load_file, save_file
from tiny import tiny_dit
from torch import Tensor

from dit_engine.backends.lean.vae import LeanDecoder
from dit_engine.checkpoint import build_vae, load_checkpoint, save_pretrained
from dit_engine.decode import LatentDecoder
from dit_engine.vae import AutoencoderKL, VAEConfig

SHAPES = [
    {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "layers_per_block": 2},
    {"block_out_channels": (16, 8), "norm_num_groups": 8, "mid_block_add_attention": False,
     "latent_channels": 6, "in_channels": 1, "out_channels": 1, "scaling_factor": 0.5},
]  # fmt: skip
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def theirs(**values: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    depth = len(values["block_out_channels"])
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        **values,
    )
    for parameter in vae.parameters():  # norms of weight 1 and bias 0 would hide what they do
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 or 0.1)
    return vae.double().eval()


def loaded(source: Path, in_channels: int = 4) -> AutoencoderKL:
    """``source`` as the VAE of a transformer that has none."""
    model = source.parent / "dit"
    save_pretrained(model, tiny_dit(in_channels=in_channels))
    vae = build_vae(load_checkpoint(model, vae=source))
    assert vae is not None
    return vae


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: str(s["block_out_channels"]))
def test_encoder_and_decoder_equal_diffusers(shape: dict[str, Any], tmp_path: Path) -> None:
    reference = theirs(**shape)
    reference.save_pretrained(tmp_path / "vae")
    ours = loaded(tmp_path / "vae", shape.get("latent_channels", 4))
    f = 2 ** (len(shape["block_out_channels"]) - 1)
    torch.manual_seed(1)
    images = torch.randn(2, shape.get("in_channels", 3), 4 * f, 6 * f, dtype=torch.float64)
    z = torch.randn(2, shape.get("latent_channels", 4), 4, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = reference.encode(images).latent_dist
        mean, log_variance = ours.encode(images)
        assert_close_to_reference(mean, expected.mean, tolerance=1e-10)
        assert_close_to_reference(log_variance, expected.logvar, tolerance=1e-10)
        assert_close_to_reference(ours.decode(z), reference.decode(z).sample, tolerance=1e-10)


def test_old_attention_keys(tmp_path: Path) -> None:
    """Of other names, and as 1×1 convolutions."""
    reference = theirs(**SHAPES[0])
    reference.save_pretrained(tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old: dict[str, Tensor] = {}
    for key, tensor in load_file(path).items():
        if ".attentions." in key and "group_norm" not in key:
            if key.endswith("weight"):
                tensor = tensor[:, :, None, None]
            for new_name, old_name in OLD_NAMES.items():
                key = key.replace(new_name, old_name)
        old[key] = tensor
    save_file(old, path)
    assert any(".query." in key for key in old)
    ours = loaded(tmp_path / "vae")
    z = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        assert_close_to_reference(ours.decode(z), reference.decode(z).sample, tolerance=1e-10)


SCALES = [
    {"scaling_factor": 0.3611},
    {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    {"scaling_factor": 0.5, "latents_mean": (-1.6, 2.2, 1.3, 0.0),
     "latents_std": (8.4, 5.6, 2.6, 5.2)},
]  # fmt: skip


@pytest.mark.parametrize(
    ("scale", "make"), list(zip(SCALES, (None, LeanDecoder, None), strict=True))
)
def test_scale_and_shift_of_the_latents(scale: dict[str, Any], make: Any, tmp_path: Path) -> None:
    """Images are those that diffusers' pipelines decode, by the formulas of the pipelines."""
    reference = theirs(block_out_channels=(32, 64), layers_per_block=1, **scale).float()
    reference.save_pretrained(tmp_path / "vae")
    vae = loaded(tmp_path / "vae")
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, 4, 4, 6, generator=generator)
    if "latents_mean" in scale:  # StableDiffusionXLPipeline
        std = torch.tensor(reference.config.latents_std).view(1, 4, 1, 1)
        mean = torch.tensor(reference.config.latents_mean).view(1, 4, 1, 1)
        scaled = z * std / reference.config.scaling_factor + mean
    else:  # StableDiffusion3Pipeline
        scaled = z / reference.config.scaling_factor + (reference.config.shift_factor or 0)
    with torch.no_grad():
        expected = reference.decode(scaled).sample
    images = LatentDecoder(vae, torch.device("cpu"))(z, "fp32", make)
    assert_close_to_reference(images, expected, tolerance=1e-5)
    save_pretrained(tmp_path / "again", tiny_dit(), vae)
    again = load_checkpoint(tmp_path / "again").vae_config
    assert again == vae.config
    unset = {"shift_factor", "latents_mean", "latents_std"} - scale.keys()
    assert unset.isdisjoint(json.loads((tmp_path / "again" / "vae" / "config.json").read_text()))


def test_a_file_without_config(tmp_path: Path) -> None:
    """Shapes are read from the tensors. The rest is from the options, the file or a config.json
    beside it, or else Stable Diffusion's, with a warning."""
    reference = theirs(block_out_channels=(32, 64), layers_per_block=1)
    state = {key: tensor.contiguous() for key, tensor in reference.state_dict().items()}
    file, told = tmp_path / "vae.safetensors", tmp_path / "told.pt"
    save_file(state, file)
    torch.save({"state_dict": state | {"scale_factor": torch.tensor(0.25)}}, told)
    save_pretrained(tmp_path / "dit", tiny_dit())
    usual = VAEConfig(block_out_channels=(32, 64), layers_per_block=1)
    given = {"vae_groups": 16, "vae_scaling_factor": 0.5, "vae_shift_factor": 0.1}
    asked = replace(usual, norm_num_groups=16, scaling_factor=0.5, shift_factor=0.1)

    def config(path: Path = file, **options: Any) -> VAEConfig | None:
        return load_checkpoint(tmp_path / "dit", vae=path, **options).vae_config

    guessed = r"Stable Diffusion's 32 norm groups and 0\.18215 as the scaling factor \(give vae_gr"
    with pytest.warns(UserWarning, match=guessed):
        ours = loaded(file)
    assert ours.config == usual
    with pytest.warns(UserWarning, match=r"'s 32 norm groups \(give vae_groups"):
        assert config(told) == replace(usual, scaling_factor=0.25)
    z = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        assert_close_to_reference(ours.decode(z), reference.decode(z).sample, tolerance=1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is guessed
        assert config(**given) == asked
        text = '{"scaling_factor": 0.7, "norm_num_groups": 16, "shift_factor": 0.1}'
        (tmp_path / "config.json").write_text(text)
        assert config() == replace(asked, scaling_factor=0.7)
        assert config(vae_scaling_factor=0.5) == asked
    with pytest.raises(ValueError, match=r"scaling_factor 0\.2 is of a VAE, and .*dit has none"):
        load_checkpoint(tmp_path / "dit", vae_scaling_factor=0.2)


def test_diffusers_reads_what_we_write(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    config = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    vae = AutoencoderKL(config).to(memory_format=torch.channels_last).eval()  # as trained
    save_pretrained(tmp_path / "model", tiny_dit(), vae)
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "model", subfolder="vae")
    z = torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        assert_close_to_reference(vae.decode(z), theirs.decode(z).sample, tolerance=1e-5)
    assert theirs.config.scaling_factor == config.scaling_factor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_post_quant_conv": False}, "use_post_quant_conv False"),
        ({"latents_std": [1, 1, 1, 0]}, r"latents_std \[1, 1, 1, 0\] .* 4 finite numbers above 0"),
        ({"act_fn": "relu"}, "act_fn 'relu'"),
        ({"norm_num_groups": 3}, "8 is not a positive multiple of norm_num_groups 3"),
        ({"mid_block_add_attention": False}, "keys too many"),
        ({"scaling_factor": 10**400}, "scaling_factor 10+ is not a finite number above 0$"),
        ({"block_out_channels": None}, "block_out_channels None is not a list"),
        ({"_class_name": "AutoencoderTiny"}, "is of class 'AutoencoderTiny'"),
    ],
    ids=str,
)
def test_vae_configs_that_do_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = VAEConfig(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4)
    save_pretrained(tmp_path / "model", tiny_dit(), AutoencoderKL(config))
    path = tmp_path / "model" / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert "vae" in str(caught.value)


@pytest.fixture(scope="module")
def decoder() -> AutoencoderKL:
    torch.manual_seed(0)
    config = VAEConfig(block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4)
    return AutoencoderKL(config).double().eval().requires_grad_(False)


def test_slices_and_a_single_tile_are_exact(decoder: AutoencoderKL) -> None:
    z = torch.randn(3, 4, 12, 16, dtype=torch.float64)
    assert_close_to_reference(decoder.decode_sliced(z, 2), decoder.decode(z), tolerance=1e-12)
    assert torch.equal(decoder.decode_tiled(z, tile=16, overlap=4), decoder.decode_sliced(z))


# A last tile flush with the end, a side of just over a tile, and several tiles both ways.
@pytest.mark.parametrize(("h", "w", "overlap"), [(30, 22, 1), (17, 16, 15), (33, 65, 0)])
def test_tiles_are_exact_where_a_pixel_depends_on_one_latent(
    decoder: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, h: int, w: int, overlap: int
) -> None:
    """With enlargement as the decoder, any gap, shift or weight that is off would show."""

    def enlarge(z: Tensor) -> Tensor:
        assert max(z.shape[-2:]) <= 16
        return torch.nn.functional.interpolate(z[:, :3], scale_factor=4.0)

    monkeypatch.setattr(decoder, "decode", enlarge)
    z = torch.randn(2, 4, h, w, dtype=torch.float64)
    expected = torch.nn.functional.interpolate(z[:, :3], scale_factor=4.0)
    tiled = decoder.decode_tiled(z, tile=16, overlap=overlap)
    assert_close_to_reference(tiled, expected, tolerance=1e-6)


def test_what_decoding_and_encoding_refuse(decoder: AutoencoderKL) -> None:
    for overlap in (-1, 16):
        with pytest.raises(ValueError, match=f"overlap {overlap} is not in"):
            decoder.decode_tiled(torch.zeros(1, 4, 20, 20), tile=16, overlap=overlap)
    with pytest.raises(ValueError, match=r"image size \(10, 8\) is not a multiple of 4"):
        decoder.encode(torch.zeros(1, 3, 10, 8, dtype=torch.float64))
