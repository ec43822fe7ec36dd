"""Weights inside what training code puts around them: dicts, prefixes, counters, larger models."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import assert_close_to_reference
from pipelines import autoencoder, transformer
from safetensors.torch import save_file
from tiny import tiny_dit
from torch import Tensor

from dit_engine.checkpoint import build_vae, load_checkpoint, load_model, save_pretrained

pytest.importorskip("diffusers")

STATE = tiny_dit().state_dict()
OTHER = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
STEP = torch.tensor(5)


def prefixed(*prefixes: str, state: Mapping[str, Tensor] = STATE) -> dict[str, Any]:
    return {"".join(prefixes) + name: tensor for name, tensor in state.items()}


def assert_loads(path: Path, expected: Mapping[str, Tensor] = STATE) -> None:
    state = load_checkpoint(path, num_heads=2).state_dict
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


CASES = {
    "all of them, twice": prefixed("model.", "module.", "_orig_mod.", "module.", "model."),
    "a name of their own": {"state_dict": prefixed("net.dit.")},
    "blocks in shards": {"model": {
        re.sub(r"(blocks\.\d+\.)", r"\1_fsdp_wrapped_module.", k): v for k, v in STATE.items()}},
    "ema_model": {"ema_model": prefixed("module."), "model": OTHER},
    "net_ema": {"net": OTHER, "net_ema": STATE},
    "plain and ema.": {**OTHER, **prefixed("ema.")},
    "model. and model.ema.": {**prefixed("model.", state=OTHER), **prefixed("model.ema.")},
    "one dict twice": {"model": STATE, "ema": STATE},
    "ema with a counter": {"ema": {"module": STATE, "updates": 7}, "model": OTHER},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("error")
def test_wrapped_weights(case: str, tmp_path: Path) -> None:
    torch.save(CASES[case], tmp_path / "m.pt")
    assert_loads(tmp_path / "m.pt")


def test_prefixes_of_a_sharded_transformer(tmp_path: Path) -> None:
    """Only the shards together show what their names have in common."""
    theirs = transformer(num_layers=1)
    theirs.save_pretrained(tmp_path)
    expected = load_model(tmp_path).state_dict()
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    state = prefixed("module.", state=theirs.state_dict())
    names = {name: f"{'ff' in name}.safetensors" for name in state}
    for shard in set(names.values()):
        save_file({k: v for k, v in state.items() if names[k] == shard}, tmp_path / shard)
    index = json.dumps({"weight_map": names})
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    assert_loads(tmp_path, expected)


NO_AVERAGE = "'ema' holds no weights; taking those of 'model', which are not averaged"
LEFT_OUT = "left out beside the weights: "


@pytest.mark.parametrize(
    ("content", "said"),
    [
        *(({"ema": empty, "model": STATE, "opt": {}}, NO_AVERAGE)
          for empty in (None, {"decay": 0.999, "shadow": []})),
        (torch.optim.swa_utils.AveragedModel(tiny_dit()).state_dict(), f"{LEFT_OUT}'n_averaged'"),
        (STATE | {"step": torch.ones(1), "version": "2"}, f"{LEFT_OUT}'step', 'version'"),
        ({"ema": prefixed("ema_model.") | prefixed("online_model.", state=OTHER)
          | {"initted": torch.tensor(True), "step": STEP}}, f"{LEFT_OUT}'initted', 'step'"),
    ],
    ids=["no average", "an average's settings", "AveragedModel", "numbers", "ema_pytorch"],
)  # fmt: skip
def test_what_is_left_out_is_told(content: Any, said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.warns(UserWarning, match=f"m.pt: {said}$"):
        assert_loads(tmp_path / "m.pt")


HOLDS_ITSELF: dict[str, Any] = {}
HOLDS_ITSELF |= dict.fromkeys(("ema", "model", "state_dict", "module"), HOLDS_ITSELF)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (prefixed("a.") | prefixed("b."), "holds several models, under 'a.', 'b.'; one is needed"),
        (prefixed("_orig_mod.") | STATE, "holds the same weights twice"),
        (
            prefixed("module.") | {"pos_embed": torch.ones(2)},
            "twice, once with the prefix 'module.'",
        ),
        (STATE | {"head.weight": torch.ones(1)}, "1 keys too many: 'head.weight'"),
        (STATE | {"settings": {"a": 1}}, "'settings' is a dict, not a named tensor"),
        (HOLDS_ITSELF, "'ema' is a dict, not a named tensor"),
    ],
)
def test_what_is_no_wrapper_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "m.pt", num_heads=2)


ORIGINAL_NAMES = (  # latent-diffusion's names of diffusers' AutoencoderKL, of three levels
    *((f"down_blocks.{i}.resnets.", f"down.{i}.block.") for i in range(3)),
    *((f"down_blocks.{i}.downsamplers.0.", f"down.{i}.downsample.") for i in range(3)),
    *((f"up_blocks.{i}.resnets.", f"up.{2 - i}.block.") for i in range(3)),
    *((f"up_blocks.{i}.upsamplers.0.", f"up.{2 - i}.upsample.") for i in range(3)),
    ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
    ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"), ("group_norm", "norm"), ("to_out.0", "proj_out"),
    ("to_q", "q"), ("to_k", "k"), ("to_v", "v"),
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:nothing tells all")
def test_the_original_stable_diffusion_autoencoder(tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    widths = (32, 64, 64)
    theirs = autoencoder(*widths, layers_per_block=2).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 or 0.1)
    state: dict[str, Tensor] = {}
    for name, tensor in theirs.state_dict().items():
        attention = "attentions" in name and tensor.ndim == 2  # there 1×1 convolutions
        for ours, original in ORIGINAL_NAMES:
            name = name.replace(ours, original)
        state[name] = tensor[:, :, None, None] if attention else tensor
    assert "decoder.up.2.block.0.norm1.weight" in state and "encoder.mid.attn_1.q.weight" in state
    levels = {"down_block_types": widths, "up_block_types": widths}
    back = convert_ldm_vae_checkpoint(dict(state), levels)
    assert back.keys() == theirs.state_dict().keys()  # diffusers reads these names alike

    save_pretrained(tmp_path / "dit", tiny_dit())
    loss = {"loss.discriminator.main.0.weight": torch.ones(2), "loss.logvar": torch.ones(())}
    others = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4),
        "cond_stage_model.transformer.embeddings.position_ids": torch.arange(77)[None],
    }
    z = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    images = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    for content in (
        {"state_dict": state | loss, "global_step": 4},
        {"state_dict": others | prefixed("first_stage_model.", state=state)},
    ):
        torch.save(content, tmp_path / "vae.ckpt")
        ours = build_vae(load_checkpoint(tmp_path / "dit", vae=tmp_path / "vae.ckpt"))
        assert ours is not None
        with torch.no_grad():
            assert_close_to_reference(ours.decode(z), theirs.decode(z).sample, tolerance=1e-10)
            mean = theirs.encode(images).latent_dist.mean
            assert_close_to_reference(ours.encode(images)[0], mean, tolerance=1e-10)
