"""diffusers 0.42 as an independent reference: its DiT, its directories, its pipeline."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import assert_close_to_reference
from pipelines import pipeline, transformer
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_engine.checkpoint import load_checkpoint, load_model
from dit_engine.integrations.diffusers import DiTAdapter, accelerate
from dit_engine.model import position_embedding

diffusers = pytest.importorskip("diffusers")


def reference(**overrides: Any) -> Any:
    return transformer(**{"num_embeds_ada_norm": 10} | overrides)


def inputs(side: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, side, side, generator=generator, dtype=dtype)
    return x, torch.tensor([0, 499, 999]), torch.tensor([0, 7, 10])


@pytest.mark.parametrize(
    "overrides",
    [
        {"norm_eps": 1e-2},  # large enough to show in which norm it acts
        {"out_channels": None, "patch_size": 4, "sample_size": 16},
        {"attention_head_dim": 72, "num_layers": 1},
    ],
    ids=str,
)
def test_transformer_directory_gives_the_same_outputs(
    overrides: dict[str, Any], tmp_path: Path
) -> None:
    theirs = reference(**overrides).double()
    theirs.save_pretrained(tmp_path / "transformer")
    ours = load_model(tmp_path / "transformer")
    assert ours.config.numerics == "diffusers"
    assert ours.config.learn_sigma is (overrides.get("out_channels", 8) == 8)
    assert ours.pos_embed.dtype == torch.float64
    x, t, y = inputs(ours.config.input_size)
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=y).sample
        assert_close_to_reference(ours(x, t, y), expected, tolerance=1e-10)


def test_positions(tmp_path: Path) -> None:
    for side in (4, 16):
        theirs = reference(sample_size=2 * side).pos_embed.pos_embed
        assert (position_embedding(48, side) - theirs).abs().max() <= 6e-8  # half an ulp at 1
    reference().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    stored = torch.full((1, 16, 48), 0.25)  # as older versions stored them
    save_file(load_file(path) | {"pos_embed.pos_embed": stored}, path)
    assert torch.equal(load_model(tmp_path).pos_embed, stored)


def test_sharded_pickles(tmp_path: Path) -> None:
    model = reference()
    model.save_pretrained(tmp_path, safe_serialization=False, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.bin"))) > 1
    x, t, y = inputs(dtype=torch.float32)
    with torch.no_grad():
        expected = model(x, timestep=t, class_labels=y).sample
        assert_close_to_reference(load_model(tmp_path)(x, t, y), expected, tolerance=1e-5)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"norm_type": "ada_norm_single"}, "norm_type is 'ada_norm_single'; a DiT has"),
    ({"num_attention_heads": "2"}, "num_attention_heads '2' is not a positive integer"),
    ({"num_embeds_ada_norm": None}, "num_classes None is not a positive integer"),
    ({"sample_size": 9}, "input_size 9 is not a multiple of patch_size 2"),
]


def test_configs_of_other_networks(tmp_path: Path) -> None:
    model = reference()
    model.save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "diffusion_pytorch_model.safetensors"
    values = json.loads(config.read_text())
    for change, message in CONFIGS:
        config.write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=message) as caught:
            load_model(tmp_path)
        assert "\n" not in str(caught.value)
    config.write_text(json.dumps({key: v for key, v in values.items() if key != "norm_eps"}))
    assert load_model(weights).config == load_model(tmp_path).config
    assert load_model(tmp_path).config.mlp_norm_eps == 1e-5
    config.unlink()
    with pytest.raises(ValueError, match=r"safetensors: a diffusers transformer needs its config"):
        load_model(weights)
    with torch.no_grad():
        model.transformer_blocks[2].norm1.emb.timestep_embedder.linear_2.bias[5] += 1e-3
    model.save_pretrained(tmp_path)
    expected = r"transformer_blocks\.2\..*linear_2\.bias differs from block 0's"
    with pytest.raises(ValueError, match=expected):
        load_model(tmp_path)


def test_pipeline_directory(tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    index = json.loads(path.read_text())
    names = {str(i): f"class {i}, alias {i}" for i in range(1000)}
    path.write_text(json.dumps(index | {"id2label": names}))
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.label_names == tuple(names.values())
    assert checkpoint.vae_config is not None and checkpoint.vae_state_dict is not None
    assert checkpoint.vae_config.block_out_channels == (8, 16)
    assert checkpoint.vae_state_dict.keys() == pipe.vae.state_dict().keys()
    for wrong, message in (
        ({k: v for k, v in names.items() if k != "17"}, "id2label does not name the classes"),
        ({"0": "ant", "1": "bee"}, "2 label names, 1000 classes"),
    ):
        path.write_text(json.dumps(index | {"id2label": wrong}))
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path)
    shutil.rmtree(tmp_path / "transformer")
    with pytest.raises(ValueError, match="a DiTPipeline without transformer/"):
        load_checkpoint(tmp_path)


def images_of(pipe: Any) -> Any:
    """(N, H, W, 3) in [0, 1]."""
    return pipe(
        [3, 77], guidance_scale=4.0, generator=torch.Generator().manual_seed(5),
        num_inference_steps=3, output_type="np",
    ).images  # fmt: skip


def test_accelerated_pipeline_gives_the_same_images() -> None:
    pipe = pipeline()
    before, original = images_of(pipe), pipe.transformer
    assert accelerate(pipe) is pipe
    adapter = pipe.transformer
    assert isinstance(adapter, DiTAdapter) and adapter.config.sample_size == 8
    assert (adapter.dtype, adapter.device) == (torch.float32, torch.device("cpu"))
    assert before.shape == (2, 16, 16, 3) and before.std() > 0.05
    assert_close_to_reference(images_of(pipe), before, tolerance=1e-5)
    shared = adapter.model.blocks[0].mlp.fc1.weight.data_ptr()
    assert shared == original.transformer_blocks[0].ff.net[0].proj.weight.data_ptr()
    assert accelerate(pipe).transformer is adapter
    assert pipe.to(torch.float64).transformer.dtype == torch.float64
    with pytest.raises(ValueError, match="transformer of object is a NoneType; a DiTPipeline's"):
        accelerate(object())


def test_an_accelerated_pipeline_is_saved_as_the_pipeline_that_it_was(tmp_path: Path) -> None:
    pipe = pipeline().to(torch.float16)
    pipe.save_pretrained(tmp_path / "before")
    diffusers.DiTPipeline(**accelerate(pipe).components).save_pretrained(tmp_path / "after")
    before, after = (
        {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for folder in (tmp_path / "before", tmp_path / "after")
    )
    assert before == after
    assert load_model(tmp_path / "after").pos_embed.dtype == torch.float16


def test_the_adapter_is_called_and_copied_as_the_transformer() -> None:
    pipe = pipeline()
    x, _, y = inputs(dtype=torch.float32)
    t = torch.tensor(321)
    with torch.no_grad():
        expected = pipe.transformer(x, t.expand(3), y, return_dict=False)[0]
        adapter = accelerate(pipe).transformer
        (actual,) = adapter(x, timestep=t, class_labels=y, return_dict=False)
        assert_close_to_reference(actual, expected, tolerance=1e-5)
        for copied in (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))):
            twin = copied(adapter)
            assert isinstance(twin, DiTAdapter) and not twin.training
            assert torch.equal(twin(x, t, y).sample, actual)
        with pytest.raises(ValueError, match="class_labels are needed"):
            adapter(x, t)
        with pytest.raises(ValueError, match="cross_attention_kwargs"):
            adapter(x, t, y, {"scale": 0.5})
