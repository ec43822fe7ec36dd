"""Noise schedule and time-step spacing: which steps a sampler takes, and their coefficients.

The diffusion (`dit_engine.sampling.diffusion`) has N steps, of which a sampler visits a subset; the
published one has 1000. Everything here is float64 numpy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from dit_engine.sampling.diffusion import OWN_SPACINGS, PUBLISHED_DIFFUSION, Diffusion

SPACINGS = ("official", "ddim", "leading", "linspace", "trailing", "even", "solver-leading")
STRIDED = ("ddim linspace", "ddim trailing")  # of `OWN_SPACINGS`
SOLVER_LEAST_SIGNAL = 2.0**-24
"""ᾱ that dpm++ takes for 0, where λ has no value; that of diffusers' solvers."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """One run of a sampler; arrays are float64 in the order in which steps are taken.

    Entry k = 0 belongs to the first step, which removes the most noise. The names are the
    reference's (``GaussianDiffusion``), whose arrays run the other way.

    Attributes:
        timesteps: (steps,) int64, the original time step that the model is given at step k.
        alphas_cumprod: (steps,) ᾱ of the latent that step k starts from.
        alphas_cumprod_prev: (steps,) ᾱ of the latent that step k yields; the last is exactly 1.
        betas: (steps,) 1 − ᾱ/ᾱ_prev, the betas of the respaced diffusion.
        diffusion: what it is a schedule of.
        ddim_stride: how many time steps each step of ddim goes down, for spacings where it does not
            end where the next step starts (`STRIDED`); else None.
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
        to 0.01 at t = 0: noise over signal, the σ of Karras et al. 2022. Infinite at ᾱ = 0."""
        with np.errstate(divide="ignore"):
            return np.sqrt((1.0 - self.alphas_cumprod) / self.alphas_cumprod)

    @cached_property
    def sqrt_recip_alphas_cumprod(self) -> np.ndarray:
        """(steps,) factor of z in x0 = √(1/ᾱ)·z − √(1/ᾱ−1)·eps."""
        return np.sqrt(1.0 / self.alphas_cumprod)

    @cached_property
    def sqrt_recipm1_alphas_cumprod(self) -> np.ndarray:
        """(steps,) factor of eps in x0 = √(1/ᾱ)·z − √(1/ᾱ−1)·eps."""
        return np.sqrt(1.0 / self.alphas_cumprod - 1)

    @cached_property
    def x0_weights(self) -> np.ndarray:
        """(steps, 2) factors of z and of the model's output in the predicted x0."""
        now, kind = self.alphas_cumprod, self.diffusion.prediction
        if kind == "epsilon":
            pair = self.sqrt_recip_alphas_cumprod, -self.sqrt_recipm1_alphas_cumprod
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
        """(steps,) ``alphas_cumprod_prev`` as ddim takes them."""
        table = self.diffusion.alphas_cumprod
        end = table[0] if self.diffusion.end_at_first else 1.0
        if self.ddim_stride is not None:
            t = self.timesteps - self.ddim_stride
            return np.where(t < 0, end, table[t])
        return np.append(self.alphas_cumprod_prev[:-1], end)

    @cached_property
    def solver_alphas_cumprod(self) -> np.ndarray:
        """(steps,) ``alphas_cumprod`` as dpm++ takes them."""
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
        """(steps,) lower bound of the learned log variance: the posterior's.

        The last step's variance is 0: its logarithm is replaced by the step before's. It is never
        used, since no noise is added there. (With one step the reference has no value at all.)
        """
        ratio = (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        variance = self.betas * ratio  # (steps,)
        if len(self) == 1:
            return self.log_betas
        variance[-1] = variance[-2]
        return np.log(variance)

    def fixed_log_variance(self, learned: bool) -> np.ndarray | None:
        """(steps,) log variance that ddpm adds whatever the model gives; None is the learned one.

        learned: whether the model gives one. Without, it is the reference's FIXED_LARGE.
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
        steps: 1 to N, which is 1000 of the published diffusion.
        spacing: see ``space_timesteps``.

    Raises:
        ValueError: steps out of range or no integer, an unknown spacing, or a number of steps
            that the spacing cannot make.
    """
    schedule = schedule_from_timesteps(space_timesteps(steps, spacing, diffusion), diffusion)
    own = diffusion.scheduler in STRIDED and OWN_SPACINGS[diffusion.scheduler] == spacing
    return replace(schedule, ddim_stride=diffusion.num_train_steps // steps) if own else schedule


def schedule_from_timesteps(
    timesteps: np.ndarray | list[int], diffusion: Diffusion = PUBLISHED_DIFFUSION
) -> Schedule:
    """The schedule that visits these time steps, given in the order taken: strictly falling.

    Raises:
        ValueError: none, out of 0 … N − 1, or not strictly falling.
    """
    taken = np.array(timesteps, dtype=np.int64)
    if taken.ndim != 1 or len(taken) == 0:
        raise ValueError(f"timesteps {timesteps!r} is not a list of at least one time step")
    last = diffusion.num_train_steps - 1
    if taken.min() < 0 or taken.max() > last:
        reach = f"timesteps reach from {taken.min()} to {taken.max()}"
        raise ValueError(f"{reach}: allowed is 0 … {last}")
    if (np.diff(taken) >= 0).any():
        raise ValueError(f"timesteps {taken.tolist()} do not fall strictly")

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
    """(steps,) int64 time steps in the order taken, strictly falling.

    Spacings, told of N = 1000 steps:
        official: the reference's respacing of one section (``space_timesteps`` of
            facebookresearch/DiT): from 0 in strides of 999/(steps−1), so it ends at 999. One step
            is [0], as there; for a picture in one step use linspace or trailing, whose step is 999.
        ddim: the reference's "ddimN": the smallest integer stride that makes N steps from 0. Only
            some N can be made.
        leading: diffusers' name: integer stride ⌊1000/steps⌋ from 0 (DiTPipeline's).
        linspace: as diffusers' DPMSolverMultistepScheduler: steps+1 points from 999 to 0, of which
            the last is left out. 1000 steps, which would repeat one, are every step instead.
        trailing: diffusers' name: from 999 down in strides of 1000/steps. 62 numbers of steps, 61
            the smallest, of which diffusers makes one more than asked for, are refused.
        even: "linspace" of diffusers' DDIMScheduler and DDPMScheduler: from 999 to 0. As official,
            but for how halves round.
        solver-leading: "leading" of diffusers' DPMSolverMultistepScheduler: integer stride
            ⌊1000/(steps+1)⌋, and the last step is one stride above 0. 1000 steps are every step.

    Raises:
        ValueError: see ``make_schedule``.
    """
    n = diffusion.num_train_steps
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)):
        raise ValueError(f"steps {steps!r} is not an integer from 1 to {n}")
    if not 1 <= steps <= n:
        raise ValueError(f"steps {steps} is out of range: allowed is 1 to {n}")
    if spacing == "official":
        return np.array(_official(int(steps), n)[::-1], dtype=np.int64)
    if spacing == "ddim":
        return np.arange(0, n, _ddim_stride(int(steps), n), dtype=np.int64)[::-1].copy()
    if spacing in ("leading", "solver-leading"):
        start = 0 if spacing == "leading" or steps == n else 1
        stride, offset = n // (steps + start), diffusion.steps_offset
        if offset >= stride:  # the last step would not reach the end, or the first is beyond N
            most = n // (offset + 1) - start
            raise ValueError(
                f"steps {steps}: allowed is 1 to {most} for spacing {spacing!r}"
                f" and steps_offset {offset}"
            )
        return np.arange(start, steps + start, dtype=np.int64)[::-1] * stride + offset
    if spacing == "linspace":
        points = np.linspace(0, n - 1, steps + 1).round()[:0:-1].astype(np.int64)
        return np.arange(n)[::-1].copy() if steps == n else points
    if spacing == "even":
        return np.linspace(0, n - 1, steps).round()[::-1].astype(np.int64)
    if spacing == "trailing":
        return _trailing(int(steps), n)
    raise ValueError(f"spacing {spacing!r} is unknown; choose one of {', '.join(SPACINGS)}")


def _official(steps: int, n: int) -> list[int]:
    stride = (n - 1) / (steps - 1) if steps > 1 else 1.0
    timesteps, position = [], 0.0
    for _ in range(steps):
        timesteps.append(round(position))
        position += stride  # accumulated, not multiplied: the sums round differently
    return timesteps


def _trailing(steps: int, n: int) -> np.ndarray:
    def points(count: int) -> np.ndarray:
        return np.arange(n, 0, -n / count)  # its rounding decides halves and how many there are

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
    strides = {count: stride for stride, count in counts.items()}  # smallest stride of a count
    if steps not in strides:
        near = sorted(sorted(strides, key=lambda count: abs(count - steps))[:2])
        raise ValueError(
            f"steps {steps} has no integer stride for spacing 'ddim'; nearest are "
            f"{near[0]} and {near[1]}"
        )
    return strides[steps]
