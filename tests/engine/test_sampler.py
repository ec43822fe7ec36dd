"""Samplers against the original's trajectories and diffusers' schedulers, and their manners."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from numerics import assert_close_to_reference
from reference_embedding import vector_timestep_embedding
from torch import Tensor
from vectors import Vectors

import dit_engine.model
from dit_engine.model import DiT
from dit_engine.plan import parse_scales
from dit_engine.sampling.guidance import guided
from dit_engine.sampling.samplers import SAMPLERS, ddim, ddpm, dpm_solver_pp
from dit_engine.sampling.schedule import Schedule, make_schedule


def denoiser_of(model: DiT, schedule: Schedule, labels: Tensor) -> Callable[[Tensor, int], Tensor]:
    def denoise(z: Tensor, k: int) -> Tensor:
        t = torch.full((len(z),), int(schedule.timesteps[k]))
        return model(z, t, labels[: len(z)])

    return denoise


RUNS = {
    "ddpm": (ddpm, True, {}),
    "ddim": (ddim, True, {}),
    "ddim_eta1": (ddim, True, {"eta": 1.0}),
    "ddpm_nocfg": (ddpm, False, {}),
}


def sample(vectors: Vectors, run: str, dtype: torch.dtype) -> Tensor:
    sampler, guides, options = RUNS[run]
    model, schedule = vectors.model(dtype), make_schedule(vectors.steps)
    x, y = vectors["forward.x"].to(dtype), vectors["forward.y"]
    draws = vectors[f"{run}.noise"]  # (steps, 2N or N, 4, S, S)
    denoise = denoiser_of(model, schedule, torch.cat([y, vectors.null]))
    if guides:
        denoise = guided(denoise, parse_scales(vectors.guidance_scale, len(x)))
    return sampler(denoise, x, schedule, lambda k: draws[k, : len(x)], **options)


@pytest.mark.parametrize("run", RUNS)
def test_float64_trajectories_are_the_originals(
    vectors: Vectors, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With their own float32 frequencies, found from forward.out (reference_embedding.py)."""
    monkeypatch.setattr(dit_engine.model, "timestep_embedding", vector_timestep_embedding)
    out = sample(vectors, run, torch.float64)
    assert out.dtype == torch.float64
    assert_close_to_reference(out, vectors[f"{run}.out"], tolerance=1e-6)  # measured: 1.3e-7


@pytest.mark.parametrize("run", RUNS)
def test_float32_trajectories_are_the_originals(vectors: Vectors, run: str) -> None:
    out = sample(vectors, run, torch.float32)
    assert out.dtype == torch.float32
    assert_close_to_reference(out, vectors[f"{run}.out"], tolerance=1e-4)


def toy(z: Tensor, t: int) -> Tensor:
    """A smooth, bounded, non-linear epsilon that depends on position and time."""
    where = torch.linspace(-1, 1, z.shape[-1], dtype=z.dtype)
    return torch.tanh(0.7 * z + where * math.cos(t / 150)) + 0.1 * z.mean((1, 2, 3), keepdim=True)


def start(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(3)).to(dtype)


def draws(k: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + k)
    return torch.randn(2, 4, 6, 6, generator=generator).double()


BETAS = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}
STEP_COUNTS = [1, 2, 20]


@pytest.mark.parametrize("steps", STEP_COUNTS)
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 6e-7), (torch.float32, 2e-6)])
def test_ddim_is_diffusers(steps: int, eta: float, dtype: torch.dtype, tolerance: float) -> None:
    """diffusers computes ᾱ in float32, as a product of 1000 factors: its own error is 3e-7."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    expected = start(dtype)
    for k, t in enumerate(scheduler.timesteps.tolist()):
        noise = draws(k).to(dtype) if eta else None
        step = scheduler.step(toy(expected, t), t, expected, eta=eta, variance_noise=noise)
        expected = step.prev_sample
    schedule = make_schedule(steps, "leading")
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
    ours = ddim(
        lambda z, k: toy(z, int(schedule.timesteps[k])), start(dtype), schedule, draws, eta=eta
    )
    assert ours.dtype == expected.dtype == dtype
    assert_close_to_reference(ours, expected, tolerance=tolerance)


@pytest.mark.parametrize("steps", STEP_COUNTS)
@pytest.mark.parametrize("spacing", ["linspace", "official"])
def test_dpm_solver_is_diffusers(steps: int, spacing: str) -> None:
    """In float32, which diffusers' scheduler casts to; ours runs in both dtypes."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
        prediction_type="epsilon", timestep_spacing="linspace", final_sigmas_type="zero",
    )  # fmt: skip
    schedule = make_schedule(steps, spacing)
    if spacing == "linspace":
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(timesteps=schedule.timesteps.tolist())
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
    expected = start(torch.float32)
    for t in scheduler.timesteps:
        expected = scheduler.step(toy(expected, int(t)), t, expected).prev_sample
    for dtype in (torch.float32, torch.float64):
        ours = dpm_solver_pp(
            lambda z, k: toy(z, int(schedule.timesteps[k])), start(dtype), schedule, draws
        )
        assert ours.dtype == dtype
        assert_close_to_reference(ours, expected, tolerance=2e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_is_asked_for_where_it_is_used_and_the_callback_sees_each_step(name: str) -> None:
    schedule, seen, asked = make_schedule(6, "linspace"), list[int](), list[int]()
    SAMPLERS[name].function(
        lambda z, k: toy(z, int(schedule.timesteps[k])), start(torch.float32), schedule,
        lambda k: asked.append(k) or draws(k), lambda k, z: seen.append(k),
        **({"eta": 0.3} if name == "ddim" else {}),
    )  # fmt: skip
    assert seen == list(range(6)) and asked == ([] if name == "dpm++" else [0, 1, 2, 3, 4])


def test_ddim_with_full_noise_is_finite_where_a_radicand_is_nearly_zero() -> None:
    for steps in range(1, 60):
        for spacing in ("official", "trailing", "linspace", "leading"):
            schedule = make_schedule(steps, spacing)
            denoise = lambda z, k: toy(z, int(schedule.timesteps[k]))  # noqa: B023, E731
            out = ddim(denoise, start(torch.float32), schedule, draws, eta=1.0)
            assert out.isfinite().all(), (steps, spacing)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_half_precision_model_leaves_the_trajectory_in_float32(name: str) -> None:
    """Each prediction is rounded to bfloat16 once, by the model, and nothing else is."""
    schedule = make_schedule(4)

    def answer(z: Tensor, k: int) -> Tensor:
        return torch.cat([toy(z, int(schedule.timesteps[k])), torch.tanh(z)], dim=1).bfloat16()

    function = SAMPLERS[name].function
    out = function(answer, start(torch.float32), schedule, draws)
    expected = function(lambda z, k: answer(z, k).float(), start(torch.float32), schedule, draws)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)


def test_what_samplers_refuse() -> None:
    z, schedule = start(torch.float32), make_schedule(2)
    with pytest.raises(ValueError, match=r"^denoiser gave 3 channels for latents of 4"):
        ddpm(lambda z, k: z[:, :3], z, schedule, draws)
    with pytest.raises(ValueError, match=r"^eta 1.1 is out of range: allowed is 0 to 1$"):
        ddim(lambda z, k: z, z, schedule, draws, eta=1.1)
