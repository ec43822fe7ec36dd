"""Noise schedule and time-step spacing: which steps a sampler takes, and their coefficients.

A diffusion (`dit_engine.sampling.diffusion`) has N steps, 1000 in the published one. A sampler
takes some of them. Everything here is float64 numpy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from dit_engine.arguments import choice, shown, whole_number
from dit_engine.sampling.diffusion import OWN_SPACINGS, PUBLISHED_DIFFUSION, Diffusion

SPACINGS = ("official", "ddim", "leading", "linspace", "trailing", "even", "solver-leading")
STRIDED = ("ddim linspace", "ddim trailing")
"""Those keys of `OWN_SPACINGS` for which a step of ddim may end elsewhere than the next starts."""
SOLVER_LEAST_SIGNAL = 2.0**-24
"""The ᾱ that dpm++ uses in place of 0, where λ has no value. Diffusers' solvers use the same."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """The steps of one run of a sampler. Arrays are float64, in the order of the steps.

    Entry k = 0 belongs to the first step, which removes the most noise. The names are those of the
    reference (``GaussianDiffusion``), whose arrays are in the opposite order.

    Attributes:
        timesteps: (steps,) int64, the original time step that the model is given at step k.
        alphas_cumprod: (steps,) ᾱ of the latents that step k starts from.
        alphas_cumprod_prev: (steps,) ᾱ of the latents that step k makes; the last is exactly 1.
        betas: (steps,) 1 − ᾱ/ᾱ_prev, the betas of the diffusion that has only these steps.
        diffusion: the diffusion that these steps belong to.
        ddim_stride: how many time steps each step of ddim goes down, for the spacings in `STRIDED`;
            None for the others, where each step ends where the next one starts.
    """

    timesteps: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray
    betas: np.ndarray
    diffusion: Diffusion = PUBLISHED_DIFFUSION
    ddim_stride: int | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    @cached_property
    def sigmas(self) -> np.ndarray:
        """(steps,) noise level √((1−ᾱ)/ᾱ) at which the model is evaluated, 157.4 at t = 999 down
        to 0.01 at t = 0: noise over signal, the σ of Karras et al. 2022. It is infinite at ᾱ = 0.
        """
        with np.errstate(divide="ignore"):
            return np.sqrt((1.0 - self.alphas_cumprod) / self.alphas_cumprod)

    @cached_property
    def x0_weights(self) -> np.ndarray:
        """(steps, 2) factors of z and of the model's output in the predicted x0."""
        now, kind = self.alphas_cumprod, self.diffusion.prediction
        if kind == "epsilon":
            pair = np.sqrt(1.0 / now), -np.sqrt(1.0 / now - 1)
        elif kind == "v_prediction":
            pair = np.sqrt(now), -np.sqrt(1.0 - now)
        else:
            pair = np.zeros(len(self)), np.ones(len(self))
        return np.stack(pair, axis=1)

    @cached_property
    def epsilon_weights(self) -> np.ndarray:
        """(steps, 2) factors of z and of the model's output in the predicted noise."""
        now, kind = self.alphas_cumprod, self.diffusion.prediction
        if kind == "epsilon":
            pair = np.zeros(len(self)), np.ones(len(self))
        elif kind == "v_prediction":
            pair = np.sqrt(1.0 - now), np.sqrt(now)
        else:
            pair = 1.0 / np.sqrt(1.0 - now), -np.sqrt(now / (1.0 - now))
        return np.stack(pair, axis=1)

    @cached_property
    def ddim_alphas_cumprod_prev(self) -> np.ndarray:
        """(steps,) the ``alphas_cumprod_prev`` that ddim uses."""
        table = self.diffusion.alphas_cumprod
        end = table[0] if self.diffusion.end_at_first else 1.0
        if self.ddim_stride is not None:
            t = self.timesteps - self.ddim_stride
            return np.where(t < 0, end, table[t])
        return np.append(self.alphas_cumprod_prev[:-1], end)

    @cached_property
    def solver_alphas_cumprod(self) -> np.ndarray:
        """(steps,) the ``alphas_cumprod`` that dpm++ uses."""
        now = self.alphas_cumprod
        return np.where(now == 0, SOLVER_LEAST_SIGNAL, now)

    @cached_property
    def posterior_mean_coef1(self) -> np.ndarray:
        """(steps,) factor of x0 in the mean of q(z_prev | z, x0) (Ho et al. 2020, eq. 7)."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> np.ndarray:
        """(steps,) factor of z in the same mean."""
        one_minus_prev = 1.0 - self.alphas_cumprod_prev
        return one_minus_prev * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_cumprod)

    @cached_property
    def log_betas(self) -> np.ndarray:
        """(steps,) upper bound of the learned log variance."""
        return np.log(self.betas)

    @cached_property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """(steps,) lower bound of the learned log variance, which is that of the posterior.

        The variance of the last step is 0. Its logarithm is replaced by that of the step before,
        and is never used, since no noise is added there. For a schedule of one step, where the
        reference has no value, it is the upper bound.
        """
        ratio = (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        variance = self.betas * ratio  # (steps,)
        if len(self) == 1:
            return self.log_betas
        variance[-1] = variance[-2]
        return np.log(variance)

    def fixed_log_variance(self, learned: bool) -> np.ndarray | None:
        """(steps,) log variance that ddpm uses whatever the model predicts; None means that it uses
        the learned one.

        learned: whether the model predicts a variance. If not, it is the reference's FIXED_LARGE.
        """
        kind = self.diffusion.variance
        if kind == "fixed_small":
            return self.posterior_log_variance_clipped
        return None if kind == "model" and learned else self.log_betas


def make_schedule(
    steps: int, spacing: str = "official", diffusion: Diffusion = PUBLISHED_DIFFUSION
) -> Schedule:
    """The schedule of a sampler that takes ``steps`` of the diffusion's N steps.

    Args:
        steps: 1 to N, which is 1000 for the published diffusion.
        spacing: see ``space_timesteps``.

    Raises:
        ValueError: steps out of range or not an integer, an unknown spacing, or a number of steps
            that the spacing cannot make.
    """
    taken = space_timesteps(steps, spacing, diffusion)
    schedule = schedule_from_timesteps(taken, diffusion)
    own = diffusion.scheduler in STRIDED and OWN_SPACINGS[diffusion.scheduler] == spacing
    if own:
        return replace(schedule, ddim_stride=diffusion.num_train_steps // len(taken))
    return schedule


def schedule_from_timesteps(
    timesteps: np.ndarray | list[int], diffusion: Diffusion = PUBLISHED_DIFFUSION
) -> Schedule:
    """The schedule that takes these time steps in this order.

    Raises:
        ValueError: no time step, one outside 0 … N − 1, or one that is not below the one before.
    """
    taken = np.array(timesteps, dtype=np.int64)
    last = diffusion.num_train_steps - 1
    inside = taken.ndim == 1 and len(taken) > 0 and taken.min() >= 0 and taken.max() <= last
    if not inside or (np.diff(taken) >= 0).any():
        allowed = f"one or more time steps from {last} to 0, strictly falling"
        raise ValueError(f"timesteps {shown(taken.tolist())}: allowed are {allowed}")

    # As the reference does it: betas from the ratios, then ᾱ from those betas. The detour moves ᾱ
    # by parts in 1e16, which decides how a few coefficients round to float32.
    wanted = diffusion.alphas_cumprod[taken[::-1]]
    betas = 1.0 - wanted / np.append(1.0, wanted[:-1])
    alphas_cumprod = np.cumprod(1.0 - betas)
    alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
    return Schedule(
        timesteps=taken,
        alphas_cumprod=alphas_cumprod[::-1].copy(),
        alphas_cumprod_prev=alphas_cumprod_prev[::-1].copy(),
        betas=betas[::-1].copy(),
        diffusion=diffusion,
    )


def space_timesteps(
    steps: int, spacing: str = "official", diffusion: Diffusion = PUBLISHED_DIFFUSION
) -> np.ndarray:
    """(steps,) int64 time steps in the order in which they are taken, strictly falling.

    The spacings, described for N = 1000 steps:
        official: the reference's ``space_timesteps`` with one section: from 0 in strides of
            999/(steps−1), so the largest is 999. One step is [0], as there; for a picture in one
            step use linspace or trailing, whose step is 999.
        ddim: the reference's "ddimN": the smallest integer stride that makes N steps from 0. Only
            some N can be made.
        leading: diffusers' name: integer stride ⌊1000/steps⌋ from 0. DiTPipeline uses it.
        linspace: as diffusers' DPMSolverMultistepScheduler: steps+1 points from 999 to 0, of which
            the last is left out. 1000 steps would take one twice; here they take each one once.
        trailing: diffusers' name: from 999 down in strides of 1000/steps. For 62 numbers of steps,
            of which 61 is the smallest, diffusers makes one step too many; these are refused.
        even: "linspace" of diffusers' DDIMScheduler and DDPMScheduler: from 999 to 0. It differs
            from official only in how halves are rounded.
        solver-leading: "leading" of diffusers' DPMSolverMultistepScheduler: integer stride
            ⌊1000/(steps+1)⌋, and the last step is one stride above 0. 1000 steps take each one.

    Raises:
        ValueError: see ``make_schedule``.
    """
    n, count = diffusion.num_train_steps, whole_number(steps)
    if count is None or not 1 <= count <= n:
        raise ValueError(f"steps {shown(steps)} is out of range: allowed is 1 to {n}")
    if choice("spacing", spacing, SPACINGS) == "official":
        return np.array(_official(count, n)[::-1], dtype=np.int64)
    if spacing == "ddim":
        return np.arange(0, n, _ddim_stride(count, n), dtype=np.int64)[::-1].copy()
    if spacing in ("leading", "solver-leading"):
        start = 0 if spacing == "leading" or count == n else 1
        stride, offset = n // (count + start), diffusion.steps_offset
        if offset >= stride:  # the last step would not reach the end, or the first is beyond N
            most = n // (offset + 1) - start
            raise ValueError(
                f"steps {count}: allowed is 1 to {most} for spacing {spacing!r}"
                f" and steps_offset {offset}"
            )
        return np.arange(start, count + start, dtype=np.int64)[::-1] * stride + offset
    if spacing == "linspace":
        points = np.linspace(0, n - 1, count + 1).round()[:0:-1].astype(np.int64)
        return np.arange(n)[::-1].copy() if count == n else points
    if spacing == "even":
        return np.linspace(0, n - 1, count).round()[::-1].astype(np.int64)
    return _trailing(count, n)


def _official(steps: int, n: int) -> list[int]:
    stride = (n - 1) / (steps - 1) if steps > 1 else 1.0
    timesteps, position = [], 0.0
    for _ in range(steps):
        timesteps.append(round(position))
        position += stride  # added up and not multiplied, because the sums round differently
    return timesteps


def _trailing(steps: int, n: int) -> np.ndarray:
    def points(count: int) -> np.ndarray:
        return np.arange(n, 0, -n / count)  # rounding decides which steps and how many

    if len(points(steps)) == steps:
        return points(steps).round().astype(np.int64) - 1
    near = sorted(range(1, n + 1), key=lambda count: abs(count - steps))
    made = sorted([count for count in near[:20] if len(points(count)) == count][:2])
    raise ValueError(
        f"steps {steps}: spacing 'trailing' is diffusers', which makes {steps + 1} of them, the "
        f"last at time step -1; nearest are {' and '.join(map(str, made))}"
    )


def _ddim_stride(steps: int, n: int) -> int:
    counts = {stride: -(-n // stride) for stride in range(n, 0, -1)}
    strides = {count: stride for stride, count in counts.items()}  # the smallest stride for each
    if steps not in strides:
        near = sorted(sorted(strides, key=lambda count: abs(count - steps))[:2])
        raise ValueError(
            f"steps {steps} has no integer stride for spacing 'ddim'; nearest are "
            f"{near[0]} and {near[1]}"
        )
    return strides[steps]
