"""The diffusion loss against closed forms in float64."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.distributions import Normal, kl_divergence

from dit_engine.training.loss import DiffusionLoss

BETAS = np.linspace(1e-4, 2e-2, 1000)
BAR = np.cumprod(1 - BETAS)


def random_case(t: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise, out = (torch.randn(len(t), c, 6, 6, generator=generator) for c in (4, 4, 8))
    return x0, noise, out


def test_bound_is_the_divergence_of_the_two_posteriors() -> None:
    """KL of q(x_{t-1} | x_t, x_0) from the model's Gaussian, by torch.distributions in float64."""
    for step in (1, 10, 500, 999):
        x0, noise, out = random_case([step])
        losses = DiffusionLoss()(lambda *_, out=out: out, x0, torch.tensor([step]), noise)
        beta, bar, before = BETAS[step], BAR[step], BAR[step - 1]
        posterior = beta * (1 - before) / (1 - bar)
        a, b = beta * math.sqrt(before) / (1 - bar), (1 - before) * math.sqrt(1 - beta) / (1 - bar)
        x0, noise, out = x0.double(), noise.double(), out.double()
        xt = math.sqrt(bar) * x0 + math.sqrt(1 - bar) * noise
        eps, v = out.chunk(2, dim=1)
        guess = (xt - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
        log_variance = (v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(posterior)
        true = Normal(a * x0 + b * xt, math.sqrt(posterior))
        model = Normal(a * guess + b * xt, (0.5 * log_variance).exp())
        expected = kl_divergence(true, model).mean() / math.log(2)
        assert abs(losses["bound"] - expected) / expected < 2e-3  # float32 differences of means
        assert torch.allclose(losses["mse"].double(), (eps - noise).square().mean())
        assert torch.allclose(losses["loss"], losses["mse"] + losses["bound"])


def test_bound_at_step_zero_is_a_likelihood_in_bits() -> None:
    """With the true noise predicted, the mean is x0: the bin's probability is erf's, closely."""
    x0 = torch.zeros(1, 4, 4, 4)
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    out = torch.cat([noise, torch.ones_like(noise)], dim=1)  # the upper variance, beta_0
    bound = DiffusionLoss()(lambda *_: out, x0, torch.tensor([0]), noise)["bound"]
    std = math.sqrt(BETAS[0])
    expected = -math.log2(math.erf(1 / 255 / std / math.sqrt(2)))
    assert abs(bound.item() - expected) < 2e-3 * expected


def test_the_bound_moves_the_variance_only() -> None:
    x0, noise, out = random_case([5, 700])
    out.requires_grad_()
    loss = DiffusionLoss()
    loss(lambda *_: out, x0, torch.tensor([5, 700]), noise)["bound"].backward()
    assert out.grad is not None
    assert out.grad[:, :4].abs().max() == 0 and (out.grad[:, 4:] != 0).all()
