"""A pipeline's scheduler_config.json: DiTPipeline's own images, or a refusal that names the key."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numerics import relative_error
from pipelines import pipeline
from torch import Tensor

from dit_engine.checkpoint import load_checkpoint, load_model, save_pretrained
from dit_engine.engine import Engine
from dit_engine.sampling.diffusion import PUBLISHED_DIFFUSION, Diffusion
from dit_engine.sampling.schedule import make_schedule

diffusers = pytest.importorskip("diffusers")

LABELS, SEED = [3, 77], 5
SHAPE = (2, 4, 8, 8)


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    return {"learned": pipeline(num_layers=1), "unlearned": pipeline(num_layers=1, out_channels=4)}


@pytest.fixture(scope="module")
def saved(pipelines: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline")
    pipelines["learned"].scheduler = diffusers.DDIMScheduler()
    pipelines["learned"].save_pretrained(path)
    return path


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "pipeline")


def theirs(pipe: Any, steps: int) -> tuple[Tensor, np.ndarray, Tensor]:
    """DiTPipeline's last latents and images, and its noise of each step, of LABELS and SEED."""
    latents: list[Tensor] = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z: latents.append(z) or decode(z)
    try:
        torch.manual_seed(SEED)  # DiTPipeline gives its scheduler no generator
        images = pipe(
            LABELS, num_inference_steps=steps, output_type="np",
            generator=torch.Generator().manual_seed(SEED),
        ).images  # fmt: skip
    finally:
        del pipe.vae.decode
    torch.manual_seed(SEED)
    n = len(LABELS)
    draws = torch.stack([torch.randn(2 * n, *SHAPE[1:])[:n] for _ in range(steps)])
    return latents[0] * pipe.vae.config.scaling_factor, images, draws


SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DPMSolverMultistepScheduler": "dpm++",
}
DDIM, DDPM, SOLVER = SAMPLERS
BETAS = [*np.linspace(1e-3, 3e-2, 400).tolist()]
STABLE = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1,
    "set_alpha_to_one": False, "clip_sample": False,
}  # fmt: skip
V = {"prediction_type": "v_prediction"}
ZERO = V | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
UNLEARNED = {"variance_type": "fixed_large", "clip_sample": False}

CASES = [
    (DDIM, {}, 7),  # clip_sample is True unless a file says otherwise
    (DDIM, {"trained_betas": BETAS, "num_train_timesteps": 400}, 7),
    (DDIM, STABLE, 7),
    (DDIM, {"prediction_type": "sample"}, 7),
    (DDIM, ZERO, 7),  # which goes to step 0 at last
    (DDIM, {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False} | V, 7),
    (DDIM, {"timestep_spacing": "linspace", "clip_sample": False}, 21),
    (DDPM, {}, 7),
    (DDPM, UNLEARNED, 7),
    (DDPM, V | {"clip_sample_range": 2.0}, 7),
    (DDPM, ZERO, 7),
    (DDPM, STABLE, 7),
    (SOLVER, {}, 7),
    (SOLVER, {"timestep_spacing": "leading", "steps_offset": 1}, 7),
    (SOLVER, ZERO, 7),
]


@pytest.mark.parametrize(
    ("variance", "kind", "values", "steps"),
    [("learned", *case) for case in CASES]
    + [("unlearned", DDPM, {}, 7), ("unlearned", DDPM, UNLEARNED, 7)],
    ids=lambda value: str(value)[:90],
)
def test_the_pipelines_own_images(
    pipelines: dict[str, Any], variance: str, kind: str, values: dict[str, Any], steps: int,
    tmp_path: Path,
) -> None:  # fmt: skip
    pipe, scheduler = pipelines[variance], getattr(diffusers, kind)
    known = set(scheduler.__init__.__wrapped__.__annotations__)
    pipe.scheduler = scheduler(**{key: v for key, v in values.items() if key in known})
    pipe.save_pretrained(tmp_path)
    expected, images, draws = theirs(pipe, steps)
    engine = Engine.from_pretrained(tmp_path, device="cpu")
    options: dict[str, Any] = {
        "sampler": SAMPLERS[kind], "steps": steps, "guidance_channels": None, "step_noise": draws,
        "spacing": pipe.scheduler.config.timestep_spacing,
        "latents": torch.randn(SHAPE, generator=torch.Generator().manual_seed(SEED)),
    }  # fmt: skip
    for backend in ("lean", "eager"):
        z = engine.generate(LABELS, backend=backend, output="latent", **options).images
        assert relative_error(z, expected) < 1e-3
    shown = engine.generate(LABELS, output="pt", **options).images.permute(0, 2, 3, 1)
    assert (shown - torch.from_numpy(images)).abs().max() < 0.5 / 255


def change(directory: Path, **values: Any) -> Path:
    path = directory / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return directory


def test_what_files_say_of_the_diffusion(directory: Path) -> None:
    heun = diffusers.HeunDiscreteScheduler().config
    for values, expected in (
        # facebook/DiT-XL-2-256 has this one; without the file it is the same.
        ({"_class_name": DDIM, "clip_sample": False}, PUBLISHED_DIFFUSION),
        ({"_class_name": DDPM, "clip_sample": False, "variance_type": "learned_range"},
         PUBLISHED_DIFFUSION),
        ({"_class_name": SOLVER}, PUBLISHED_DIFFUSION),  # whose usual spacing is linspace
        ({"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear",
          "use_karras_sigmas": True}, Diffusion(beta_schedule="scaled_linear")),
        ({"_class_name": "HeunDiscreteScheduler"},
         Diffusion(beta_start=heun.beta_start, beta_end=heun.beta_end)),
    ):  # fmt: skip
        path = directory / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(values))
        assert load_model(directory).config.diffusion == expected
    shutil.rmtree(directory / "scheduler")
    index = json.loads((directory / "model_index.json").read_text())
    assert index["scheduler"][1] == "DDIMScheduler"
    with pytest.warns(UserWarning, match=r"names a scheduler, 'DDIMScheduler', but there is no"):
        assert load_model(directory).config.diffusion == PUBLISHED_DIFFUSION


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name 'FlowMatchEulerDiscrete"),
    ({"num_train_timesteps": "1000"}, "num_train_timesteps '1000' is not a whole number"),
    ({"beta_start": math.nan}, "beta_start nan is not between 0 and 1"),
    ({"beta_end": 0.9}, "the betas leave ᾱ = .* after the last step"),
    ({"trained_betas": [0.1] * 5}, "trained_betas holds 5 numbers for 1000 steps"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True needs prediction_type 'v_"),
    ({"clip_sample": "yes"}, "clip_sample 'yes' is neither true nor false"),
    ({"clip_sample": True, "clip_sample_range": None}, "clip_sample_range None is not a fin"),
    ({"thresholding": True}, "thresholding True is not what the samplers do: False is"),
    *(({"_class_name": kind, key: value}, re.escape(f"{key} {value!r} is not"))
      for kind, key, value in (
        ("EulerDiscreteScheduler", "timestep_type", "continuous"),
        (DDPM, "variance_type", "learned"), (SOLVER, "use_karras_sigmas", True))),
    ({"_class_name": DDPM, "variance_type": "fixed_large", "steps_offset": 1},
     "variance_type 'fixed_large': DDPMScheduler adds noise at its last step"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_done_is_refused(
    values: dict[str, Any], message: str, directory: Path
) -> None:
    expected = rf"scheduler.scheduler_config\.json: {message}"
    with pytest.raises(ValueError, match=expected) as caught:
        load_checkpoint(change(directory, **values))
    assert "\n" not in str(caught.value)


def test_a_learned_range_needs_a_learned_variance(
    pipelines: dict[str, Any], tmp_path: Path
) -> None:
    pipelines["unlearned"].scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    pipelines["unlearned"].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="variance_type 'learned_range': the transformer"):
        load_checkpoint(tmp_path)


def test_the_pipeline_is_found_from_its_transformer(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(directory, prediction_type="v_prediction")
    expected = Diffusion(prediction="v_prediction", clip=1.0)
    name, link = "diffusion_pytorch_model.safetensors", tmp_path / "link"
    weights = directory / "transformer" / name
    link.symlink_to(directory / "transformer")
    monkeypatch.chdir(directory / "transformer")
    blob = weights.rename(tmp_path / "blob")  # as in the hub's cache
    weights.symlink_to(blob)
    for source in (directory, directory / "transformer", weights, ".", name, link):
        assert load_model(source).config.diffusion == expected
    (directory / "model_index.json").unlink()
    with pytest.warns(UserWarning, match=r"is taken for this model's, although there is no"):
        assert load_model(link).config.diffusion == expected


def test_keys_without_effect_are_named(directory: Path) -> None:
    said = r"scheduler_config\.json: unknown, without effect: zeta, eta, clip_sample$"
    change(directory, zeta=1, _private=2, eta=0.5, _class_name=SOLVER, clip_sample=True)
    with pytest.warns(UserWarning, match=said):  # SOLVER does not clip
        assert load_model(directory).config.diffusion.clip is None


def test_the_diffusion_is_saved_and_recorded(directory: Path, tmp_path: Path) -> None:
    change(directory, trained_betas=BETAS, num_train_timesteps=400, prediction_type="v_prediction")
    engine = Engine.from_pretrained(directory, device="cpu")
    save_pretrained(tmp_path / "native", engine.model, engine.vae)
    again = Engine.from_pretrained(tmp_path / "native", device="cpu")
    assert again.config == engine.config
    assert again.config.diffusion.trained_betas == tuple(BETAS)
    record = engine.generate([3], sampler="ddim", steps=3, output="latent").settings["diffusion"]
    assert record["prediction"] == "v_prediction"
    assert record["num_train_steps"] == 400
    assert len(record["trained_betas_sha256"]) == 64
    assert "diffusion" not in load_model("builtin").config.to_dict()


def test_a_sampler_takes_no_more_steps_than_the_model_has(directory: Path) -> None:
    engine = Engine.from_pretrained(change(directory, num_train_timesteps=9), device="cpu")
    assert engine.generate([3], seed=0, output="latent").settings["steps"] == 9  # usually 250
    with pytest.raises(ValueError, match="steps 10 is out of range: allowed is 1 to 9"):
        engine.generate([3], steps=10)
    offset = Diffusion(steps_offset=1)
    assert make_schedule(500, "leading", offset).timesteps[[0, -1]].tolist() == [999, 1]
    with pytest.raises(ValueError, match="steps 501: allowed is 1 to 500 for spacing 'leading'"):
        make_schedule(501, "leading", offset)
