"""The samplers' steps as coefficients of one affine update, in float64 numpy and without torch.

`dit_engine.sampling.loop` says what they multiply.
"""

from __future__ import annotations

import numpy as np

from dit_engine.sampling.schedule import Schedule

LARGEST = 1e18
"""Latents and the predicted x₀ count as infinite from this size on. The square of a larger number
overflows float32, for example in the model's norms, and backends differ in what follows."""


def step_coefficients(name: str, schedule: Schedule, learned: bool, eta: float = 0.0) -> np.ndarray:
    """(steps, 9) float64: a, b, c₁, c₂, c₃, c₄, low, high, s of `dit_kernels.guided_step`.

    Where the sampler clamps x₀ (`clipping`), c₁ is 0: the clamped x₀ is then added afterwards.

    Args:
        name: "ddpm", "ddim" or "dpm++".
        learned: whether the model predicts a variance (which only ddpm uses).
        eta: of ddim.
    """
    rows = _SAMPLERS[name](schedule, eta, learned)
    rows[-1, 8] = 0.0  # no sampler adds noise at its last step
    if schedule.diffusion.prediction != "epsilon":
        # The operator's ε is then the model's output, and the noise is a sum of that and z.
        rows[:, :2] = schedule.x0_weights
        of_z, of_output = schedule.epsilon_weights.T
        rows[:, 3] += rows[:, 4] * of_z
        rows[:, 4] *= of_output
    if clipping(name, schedule) is not None:
        rows[:, 2] = 0.0
    return rows


def clipping(name: str, schedule: Schedule) -> tuple[float, np.ndarray] | None:
    """The bound to which sampler ``name`` clamps x₀, and the factors (steps,) with which this x₀ is
    added to the z′ of `step_coefficients`; None if the sampler does not clamp."""
    clip = schedule.diffusion.clip
    if clip is None or name == "dpm++":
        return None
    return clip, _SAMPLERS[name](schedule, 0.0, False)[:, 2]


def uses_noise(coefficients: np.ndarray) -> np.ndarray:
    """(steps,) bool: which steps draw noise."""
    return coefficients[:, 8] != 0


def _rows(schedule: Schedule) -> np.ndarray:
    rows = np.zeros((len(schedule), 9))
    rows[:, :2] = schedule.x0_weights
    return rows


def _ddpm(schedule: Schedule, _: float, learned: bool) -> np.ndarray:
    rows = _rows(schedule)
    rows[:, 2] = schedule.posterior_mean_coef1
    rows[:, 3] = schedule.posterior_mean_coef2
    fixed = schedule.fixed_log_variance(learned)
    if fixed is None:
        rows[:, 6] = schedule.posterior_log_variance_clipped
        rows[:, 7] = schedule.log_betas
        rows[:, 8] = 1.0
    else:  # low = high = 0: the operator's own factor is exp(0), whatever the model gives
        rows[:, 8] = np.exp(0.5 * fixed)
    return rows


def _ddim(schedule: Schedule, eta: float, _: bool) -> np.ndarray:
    # float32 in between, as in `samplers.ddim`: 1 − ᾱ near ᾱ = 1 shows the rounding.
    now = schedule.alphas_cumprod.astype(np.float32)
    before = schedule.ddim_alphas_cumprod_prev.astype(np.float32)
    sigmas = np.float32(eta) * np.sqrt((1 - before) / (1 - now)) * np.sqrt(1 - now / before)
    rows = _rows(schedule)
    rows[:, 2] = np.sqrt(before)
    rows[:, 4] = np.sqrt(1 - before - sigmas**2)
    rows[:, 8] = sigmas
    return rows


def _dpm_solver_pp(schedule: Schedule, _: float, __: bool) -> np.ndarray:
    now, before = schedule.solver_alphas_cumprod, schedule.alphas_cumprod_prev
    rows = np.zeros((len(schedule), 9))
    rows[:, 0] = 1 / np.sqrt(now)
    rows[:, 1] = -np.sqrt(1 - now) / np.sqrt(now)
    rows[-1, 2] = 1.0  # the last step's result is x0
    lambdas = np.log(np.sqrt(now) / np.sqrt(1 - now))
    for k in range(len(schedule) - 1):
        h = lambdas[k + 1] - lambdas[k]
        toward = -np.sqrt(before[k]) * np.expm1(-h)
        bend = 0.5 * h / (lambdas[k] - lambdas[k - 1]) if k > 0 else 0.0
        rows[k, 2] = toward * (1 + bend)
        rows[k, 3] = np.sqrt((1 - before[k]) / (1 - now[k]))
        rows[k, 5] = -toward * bend
    return rows


_SAMPLERS = {"ddpm": _ddpm, "ddim": _ddim, "dpm++": _dpm_solver_pp}
