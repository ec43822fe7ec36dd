"""What a training checkpoint's options tell, and models that only look like a DiT."""

from __future__ import annotations

import json
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_dit
from torch import Tensor

from dit_engine import Engine
from dit_engine.checkpoint import load_checkpoint, save_pretrained
from dit_engine.checkpoint.infer import infer_config
from dit_engine.checkpoint.options import Options
from dit_engine.config import ModelConfig
from dit_engine.model import DiT

STATE = tiny_dit(num_heads=4).state_dict()  # 10 classes, 48 wide: the width does not tell the heads
HEADS = {"num_heads": 4}
TABLE = "y_embedder.embedding_table.weight"
WITHOUT_NULL = STATE | {TABLE: STATE[TABLE][:-1].clone()}


def put(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def saved(path: Path, state: dict[str, Tensor] = STATE, **args: Any) -> Path:
    """As the published training script writes it."""
    args = {"results_dir": "results", "vae": "ema", "image_size": 256, "epochs": 1400} | args
    return put(path, {"model": state, "ema": state, "opt": {}, "args": Namespace(**args)})


@pytest.mark.filterwarnings("error")
def test_classes_and_heads(tmp_path: Path) -> None:
    for args in ({"args": Namespace(num_classes=10, **HEADS)}, {"hyper_parameters": HEADS}):
        path = put(tmp_path / "m.pt", {"ema": STATE} | args)
        assert load_checkpoint(path).config == tiny_dit(num_heads=4).config
    for beside in (None, [], ["--model", "x"], "text", 3, {3: 4}):  # which tell nothing
        path = put(tmp_path / "m.pt", {"ema": STATE, "args": beside})
        assert load_checkpoint(path, num_heads=4).config == tiny_dit(num_heads=4).config


@pytest.mark.parametrize("args", [{"num_classes": 10}, {"class_dropout_prob": 0.0}])
def test_a_table_without_a_null_class(args: dict[str, Any], tmp_path: Path) -> None:
    """It is the model whose null class is never asked for, and refuses what would ask for it."""
    path = saved(tmp_path / "m.pt", WITHOUT_NULL, **args, **HEADS)
    engine = Engine.from_pretrained(path, device="cpu")
    assert (engine.config.num_classes, engine.config.has_null_class) == (10, False)
    options = {"steps": 3, "seed": 1, "guidance_scale": 1}
    plain = Engine(tiny_dit(num_heads=4), device="cpu").generate([9, 0], **options).images
    for backend in ("eager", "lean"):
        images = engine.generate([9, 0], backend=backend, **options).images
        assert torch.allclose(images, plain, atol=1e-5)
    for scale, shown in (([1, 2], "2"), (0.0, "0"), (None, "4")):
        given = {} if scale is None else {"guidance_scale": scale}
        said = f"^guidance_scale {shown}: the model has no null class .*; give guidance_scale 1$"
        with pytest.raises(ValueError, match=said):
            engine.generate([9, 0], steps=3, **given)
    with pytest.raises(ValueError, match="label 10 is out of range; allowed are 0 to 9"):
        engine.generate(10, guidance_scale=1)
    save_pretrained(tmp_path / "m", engine.model)
    assert load_checkpoint(tmp_path / "m").config == engine.config
    values = json.loads((tmp_path / "m" / "config.json").read_text()) | {"has_null_class": "no"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="has_null_class 'no' is neither True nor False"):
        load_checkpoint(tmp_path / "m")


def test_a_published_name_tells_the_heads() -> None:
    with torch.device("meta"):
        state = DiT(ModelConfig.named("B/4", num_classes=3)).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("DiT-B/4", "B-4", "my-model", {"width": 3}):
            assert infer_config(state, args=Options({"model": name})).num_heads == 12
    for name, has in (("DiT-B/2", "patch_size 2"), ("DiT-L/4", "depth 24, hidden_size 1024")):
        said = rf"^args.model '{name}' has .*{has}.*; the weights ha"
        with pytest.raises(ValueError, match=said):
            infer_config(state, args=Options({"model": name}))
        assert infer_config(state, num_heads=6, args=Options({"model": name})).num_heads == 6


def test_schedules_of_the_reference_and_of_diffusers_scripts(tmp_path: Path) -> None:
    """guided-diffusion's "linear": betas that are divided by the number of steps."""
    for options, betas in (
        ({"diffusion_steps": 100, "noise_schedule": "linear"}, np.linspace(0.001, 0.2, 100)),
        ({"num_train_timesteps": 500, "beta_schedule": "scaled_linear", "beta_start": 8.5e-4,
          "beta_end": 0.012}, np.linspace(8.5e-4**0.5, 0.012**0.5, 500) ** 2),
    ):  # fmt: skip
        diffusion = load_checkpoint(saved(tmp_path / "m.pt", **options, **HEADS)).config.diffusion
        assert np.allclose(diffusion.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-12)


def args(**values: Any) -> dict[str, Any]:
    return {"args": values}


@pytest.mark.parametrize(
    ("beside", "prediction"),
    [
        (args(), "epsilon"),
        (args(predict_xstart=False, prediction_type="sample"), "sample"),
        (args(prediction="v-prediction"), "v_prediction"),
        (args(lr=1) | {"hyper_parameters": {"prediction_type": "sample"}}, "sample"),
        (args(objective="pred_v"), "v_prediction"),
        ({"opt": {"state": {}, "param_groups": [{"prediction": "x"}]}}, "epsilon"),
        (args(exp_name="a flow", vae={"num_heads": 1}), "epsilon"),
        (args(predict_xstart="True"), "sample"),
    ],
    ids=str,
)
def test_what_is_predicted(beside: dict[str, Any], prediction: str, tmp_path: Path) -> None:
    path = put(tmp_path / "m.pt", {"model": STATE} | beside)
    assert load_checkpoint(path, num_heads=4).config.diffusion.prediction == prediction
    config = load_checkpoint(path, num_heads=4, prediction="v_prediction").config
    assert config.diffusion.prediction == "v_prediction"


SIT = {"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity"}
HIDDEN = r"a (SiT|flow model) checkpoint \("
REFUSED: list[tuple[dict[str, Any], str]] = [
    # Flow models, by the names in their options.
    (args(**SIT),
     r"a SiT checkpoint \(args\.model 'SiT-XL/2', args\.path_type 'Linear', args\.pred.*epsilon"),
    (args(model="sit-xl/2"), r"a sit checkpoint \(args\.model 'sit-xl/2'\)"),
    (args(prediction="velocity"), "args.prediction 'velocity' is not one of epsilon"),
    # The same in any place.
    ({"state_dict": {"model": STATE} | args(**SIT)}, HIDDEN),
    ({"hyper_parameters": args(x=1) | {"args": Namespace(**SIT)}}, HIDDEN),
    *((args(**{name: value}), HIDDEN) for name, value in (
        ("model", {"name": "models.SiT-XL/2"}), ("loss", [{"kind": "rectified_flow"}]))),
    ({"arch": "SiT-XL/2"}, HIDDEN),
    # Options that cannot be meant.
    (args(num_classes=10) | {"cfg": {"num_classes": 11}},
     r".* contradict each other: args\.num_classes 10, cfg\.num_classes 11"),
    (args(num_classes=11, class_dropout_prob=0.1),
     r"args\.num_classes is 11, .* 11 rows; with args\.class_dropout_prob 0\.1 one more"),
    (args(sigma_small="perhaps"), r"args\.sigma_small 'perhaps' is neither True nor False"),
    (args(diffusion_steps=4000, rescale_timesteps=True),
     r"args\.rescale_timesteps with diffusion_steps 4000"),
]  # fmt: skip


@pytest.mark.parametrize(("beside", "message"), REFUSED, ids=range(len(REFUSED)))
def test_options_that_are_refused(beside: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = put(tmp_path / "last.pt", {"model": STATE} | beside)
    with pytest.raises(ValueError, match=rf"last\.pt: {message}") as caught:
        load_checkpoint(path, num_heads=4)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_flow_models_that_are_named_by_the_user(tmp_path: Path) -> None:
    """The published weights have no options, only the name of the file."""
    for name in ("SiT-XL-2-256x256.pt", "sit_b2.pt"):
        path = put(tmp_path / name, STATE)
        with pytest.raises(ValueError, match=f"{name}: a .* checkpoint, by its name; .*give pred"):
            load_checkpoint(path, num_heads=4)
        load_checkpoint(path, num_heads=4, prediction="epsilon")
    load_checkpoint(put(tmp_path / "situation.pt", STATE), num_heads=4)
    path = put(tmp_path / "m.pt", {"model": STATE} | args(**SIT))
    with pytest.raises(ValueError, match="a SiT checkpoint"):  # which is certain
        load_checkpoint(path, num_heads=4, prediction="epsilon")


@pytest.mark.parametrize("value", [-1, True, [10], {"n": 10}, torch.ones(3), "a\nb"], ids=str)
def test_options_of_odd_types(value: object, tmp_path: Path) -> None:
    for name in ("num_classes", "diffusion_steps", "noise_schedule", "beta_start", "prediction"):
        path = saved(tmp_path / "m.pt", **HEADS | {name: value})
        with pytest.raises(ValueError, match=r"m\.pt: args") as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
