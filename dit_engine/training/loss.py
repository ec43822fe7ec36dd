"""The training loss of facebookresearch/DiT: the mean squared error of epsilon plus a bound.

The variational bound teaches the learned variance (Nichol & Dhariwal 2021, "Improved DDPM",
equations 14 to 16). Both terms have weight 1, and the bound's gradient reaches the variance only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dit_engine.sampling.schedule import make_schedule


class DiffusionLoss:
    """MSE(epsilon) + bound in bits, over the 1000 steps of the linear schedule."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        schedule = make_schedule(1000)  # arrays from the noisiest step down

        def table(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values[::-1].copy()).float().to(device)

        self.steps = len(schedule)
        self.sqrt_bar = table(np.sqrt(schedule.alphas_cumprod))
        self.sqrt_one_minus_bar = table(np.sqrt(1.0 - schedule.alphas_cumprod))
        self.log_beta = table(schedule.log_betas)
        self.log_posterior = table(schedule.posterior_log_variance_clipped)
        self.x0_coefficient = table(schedule.posterior_mean_coef1)
        self.xt_coefficient = table(schedule.posterior_mean_coef2)

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """A sample of q(x_t | x_0): (N, C, S, S) at steps t (N,)."""
        return _at(self.sqrt_bar, t) * x0 + _at(self.sqrt_one_minus_bar, t) * noise

    def __call__(
        self, model: Callable[[Tensor, Tensor], Tensor], x0: Tensor, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Losses for latents x0 (N, C, S, S), steps t (N,) and noise like x0.

        ``model(x_t, t)`` gives (N, 2C, S, S) with learned variance, or (N, C, S, S) without.
        Returns "loss", "mse" and, with learned variance, "bound", as scalars.
        """
        xt = self.add_noise(x0, t, noise)
        out = model(xt, t).float()
        epsilon = out[:, : x0.shape[1]]
        mse = (epsilon - noise).square().mean()
        if out.shape[1] == x0.shape[1]:
            return {"loss": mse, "mse": mse}
        bound = self.bound(epsilon.detach(), out[:, x0.shape[1] :], x0, xt, t)
        return {"loss": mse + bound, "mse": mse, "bound": bound}

    def bound(self, epsilon: Tensor, v: Tensor, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The bound's term at step t of each sample, in bits per dimension, averaged."""
        true_mean = _at(self.x0_coefficient, t) * x0 + _at(self.xt_coefficient, t) * xt
        guess = (xt - _at(self.sqrt_one_minus_bar, t) * epsilon) / _at(self.sqrt_bar, t)
        mean = _at(self.x0_coefficient, t) * guess + _at(self.xt_coefficient, t) * xt
        low, high = _at(self.log_posterior, t), _at(self.log_beta, t)
        log_variance = low + (v + 1) / 2 * (high - low)
        kl = 0.5 * (
            log_variance - low - 1.0
            + (low - log_variance).exp()
            + (true_mean - mean).square() * (-log_variance).exp()
        )  # fmt: skip
        nll = -_discrete_gaussian_log_likelihood(x0, mean, 0.5 * log_variance)
        bits = torch.where(t.view(-1, 1, 1, 1) == 0, nll, kl) / math.log(2.0)
        return bits.mean()


def _at(table: Tensor, t: Tensor) -> Tensor:
    return table[t].view(-1, 1, 1, 1)


def _discrete_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log P of x under a Gaussian in bins of 1/127.5, open at -1 and 1 (the reference's choice)."""
    centred, inverse = x - mean, (-log_std).exp()

    def cdf(value: Tensor) -> Tensor:  # the tanh approximation that the reference uses
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (value + 0.044715 * value**3)))

    upper = cdf(inverse * (centred + 1.0 / 255.0))
    lower = cdf(inverse * (centred - 1.0 / 255.0))
    probability = torch.where(x < -0.999, upper, upper - lower)
    probability = torch.where(x > 0.999, 1.0 - lower, probability)
    return probability.clamp(min=1e-12).log()
