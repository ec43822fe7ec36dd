"""Samplers against the original's trajectories and diffusers' schedulers, and their manners."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import assert_close_to_reference, relative_error
from reference_embedding import one_ulp_effect, vector_timestep_embedding
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
def test_float64_trajectories_with_this_machines_sinusoids(vectors: Vectors, run: str) -> None:
    """Off by no more than two machines' libraries may be, an ulp of one frequency each."""
    one_ulp = one_ulp_effect(lambda: sample(vectors, run, torch.float64))
    assert one_ulp < 3e-6  # measured: 3e-7 in one file, 2.3e-6 in the other
    out = sample(vectors, run, torch.float64)
    assert_close_to_reference(out, vectors[f"{run}.out"], tolerance=2 * one_ulp)


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


def run(name: str, steps: int, spacing: str | None = None, **options: Any) -> Tensor:
    schedule = make_schedule(steps, spacing or SAMPLERS[name].spacing)
    z = start(torch.float32)
    out = SAMPLERS[name].function(
        lambda z, k: toy(z, int(schedule.timesteps[k])), z, schedule, draws, **options
    )
    assert torch.equal(z, start(torch.float32))  # not modified
    return out


def test_any_number_of_steps_is_finite() -> None:
    """Also for ddim with full noise, where a radicand is nearly zero."""
    for name in SAMPLERS:
        assert run(name, 1000).isfinite().all()
    for steps in range(1, 60):
        for spacing in ("official", "trailing", "linspace", "leading"):
            assert run("ddim", steps, spacing, eta=1.0).isfinite().all(), (steps, spacing)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_last_step_gives_the_predicted_x0_and_the_callback_sees_each(name: str) -> None:
    schedule, states = make_schedule(6, "linspace"), [start(torch.float64)]
    seen, asked = list[int](), list[int]()

    def callback(k: int, z: Tensor) -> None:
        seen.append(k)
        states.append(z)

    def noise(k: int) -> Tensor:
        asked.append(k)
        return draws(k)

    options = {"eta": 0.3} if name == "ddim" else {}
    out = SAMPLERS[name].function(
        lambda z, k: toy(z, int(schedule.timesteps[k])), states[0], schedule, noise, callback,
        **options,
    )  # fmt: skip
    assert seen == list(range(6)) and torch.equal(states[-1], out)
    assert asked == ([] if name == "dpm++" else [0, 1, 2, 3, 4])  # only where it is used
    before, a = states[-2], schedule.alphas_cumprod[-1]
    x0 = (before - math.sqrt(1 - a) * toy(before, int(schedule.timesteps[-1]))) / math.sqrt(a)
    # ddpm and ddim round their coefficients to float32.
    assert relative_error(out, x0) < (1e-15 if name == "dpm++" else 1e-6)


def test_variances_of_ddpm() -> None:
    """The distance from the mean after one step with unit noise: √beta where the variance is fixed,
    and from the posterior's to beta where it is learned."""
    schedule = make_schedule(10)
    z = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    a, prev = schedule.alphas_cumprod[0], schedule.alphas_cumprod_prev[0]
    beta = 1 - a / prev
    for told, expected in ((None, beta), (1.0, beta), (-1.0, beta * (1 - prev) / (1 - a))):
        states: list[Tensor] = []
        answer = torch.tensor([0.0] if told is None else [0.0, told], dtype=torch.float64)
        ddpm(
            lambda z, k: answer.view(1, -1, 1, 1), z, schedule, lambda k: torch.ones_like(z),  # noqa: B023
            lambda k, z: states.append(z),  # noqa: B023
        )  # fmt: skip
        assert states[0].item() == pytest.approx(math.sqrt(expected), rel=1e-6)


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


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_denoiser_with_a_wrong_number_of_channels(name: str) -> None:
    with pytest.raises(ValueError, match=r"^denoiser gave 3 channels for latents of 4"):
        SAMPLERS[name].function(
            lambda z, k: z[:, :3], start(torch.float32), make_schedule(2), draws
        )
    with pytest.raises(ValueError, match=r"^eta 1.1 is out of range: allowed is 0 to 1$"):
        run("ddim", 2, eta=1.1)
