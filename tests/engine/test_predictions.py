"""The same model written as epsilon, v or x0 prediction gives the same images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numerics import relative_error
from torch import Tensor

from dit_engine.sampling.coefficients import clipping, step_coefficients, uses_noise
from dit_engine.sampling.diffusion import Diffusion
from dit_engine.sampling.guidance import guided
from dit_engine.sampling.loop import sample_fused
from dit_engine.sampling.samplers import SAMPLERS
from dit_engine.sampling.schedule import Schedule, make_schedule
from dit_kernels.reference import guided_step

N, C, S = 3, 4, 8
SCALES = torch.tensor([1.0, 4.0, 1.5])
CHANNELS = 3  # of 4: the last is not guided


def epsilon(z: Tensor, k: int) -> Tensor:
    """Another answer for each row, and so for the two halves of guidance."""
    return torch.tanh(z * (1 + 0.1 * torch.arange(len(z)).view(-1, 1, 1, 1))) + 0.01 * k


def told(schedule: Schedule, learned: bool):
    """`epsilon` as the schedule's diffusion predicts it, with a variance where it is learned."""

    def images(z: Tensor, k: int) -> Tensor:
        eps, bar = epsilon(z.double(), k), float(schedule.alphas_cumprod[k])
        signal, level = bar**0.5, (1 - bar) ** 0.5
        x0 = (z.double() - level * eps) / signal
        first = {"epsilon": eps, "sample": x0, "v_prediction": signal * eps - level * x0}
        output = first[schedule.diffusion.prediction]
        return torch.cat([output, torch.tanh(3 * z.double())], dim=1) if learned else output

    return images


class Draws:
    def start(self) -> Tensor:
        return self(-1)

    def __call__(self, step: int) -> Tensor:
        return torch.randn(N, C, S, S, generator=torch.Generator().manual_seed(100 + step))


class Fused:
    def __init__(self, schedule: Schedule, table: np.ndarray, learned: bool) -> None:
        self.images, self.table = told(schedule, learned), torch.from_numpy(table).float()

    def guided_step(
        self, z: Tensor, x0: Tensor, noise: Tensor, step: int, guide: bool
    ) -> tuple[Tensor, Tensor]:
        output = self.images(torch.cat([z, z]) if guide else z, step).float()
        tokens = output.flatten(2).transpose(1, 2)
        return guided_step(tokens, z, x0, noise, SCALES, self.table[step], CHANNELS, 1)


@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize("variance", ["model", "fixed_small"])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++"])
def test_the_prediction_changes_nothing(
    name: str, learned: bool, variance: str, clip: float | None
) -> None:
    eta = {"eta": 0.5} if name == "ddim" else {}
    noise, results = Draws(), []
    for prediction in ("epsilon", "v_prediction", "sample"):
        diffusion = Diffusion(prediction=prediction, variance=variance, clip=clip)  # pyright: ignore[reportArgumentType]
        schedule = make_schedule(12, "leading", diffusion)
        denoise = guided(told(schedule, learned), SCALES, CHANNELS)
        z = noise.start().double()
        results.append(SAMPLERS[name].function(denoise, z, schedule, noise, **eta))
        table = step_coefficients(name, schedule, learned, *eta.values())
        always, fused = np.ones(12, dtype=bool), Fused(schedule, table, learned)
        clip_of = clipping(name, schedule)
        z = sample_fused(
            fused, noise.start(), uses_noise(table), always, noise, lambda *_: None, clip_of
        )
        results.append(z)
    assert results[0].abs().max() > 0.5
    for other in results[1:]:
        assert relative_error(other, results[0]) < 5e-5
