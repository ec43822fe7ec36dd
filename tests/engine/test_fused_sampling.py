"""One affine update per step against the samplers as they are written, and one model written as
epsilon, v or x0 prediction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numerics import relative_error
from torch import Tensor

from dit_engine.backends import FusedDenoiser
from dit_engine.plan import in_interval
from dit_engine.sampling.coefficients import clipping, step_coefficients, uses_noise
from dit_engine.sampling.diffusion import Diffusion
from dit_engine.sampling.guidance import guided
from dit_engine.sampling.loop import sample_fused
from dit_engine.sampling.samplers import SAMPLERS
from dit_engine.sampling.schedule import Schedule, make_schedule
from dit_kernels import guided_step

N, C, S, P = 3, 4, 8, 2
SCALES = torch.tensor([1.0, 4.0, 1.5])


class Model:
    """A smooth random function of (z, k), which differs between rows, and so between the halves of
    guidance; its epsilon is written as the diffusion's prediction."""

    def __init__(self, schedule: Schedule, learned: bool) -> None:
        self.schedule, self.learned = schedule, learned

    def __call__(self, z: Tensor, k: int) -> Tensor:
        rows = torch.arange(len(z)).view(-1, 1, 1, 1)
        eps, z = torch.tanh(z.double() * (1 + 0.1 * rows)) + 0.01 * k, z.double()
        bar = float(self.schedule.alphas_cumprod[k])
        signal, level = bar**0.5, (1 - bar) ** 0.5
        x0 = (z - level * eps) / signal
        told = {"epsilon": eps, "sample": x0, "v_prediction": signal * eps - level * x0}
        output = told[self.schedule.diffusion.prediction]
        return torch.cat([output, torch.tanh(3 * z)], 1) if self.learned else output


class Fused(FusedDenoiser):
    def __init__(self, model: Model, table: np.ndarray, channels: int) -> None:
        self.model, self.channels = model, channels
        self.table = torch.from_numpy(table).float()

    def guided_step(
        self, z: Tensor, x0_before: Tensor, noise: Tensor | None, step: int, guide: bool
    ) -> tuple[Tensor, Tensor]:
        images = self.model(torch.cat([z, z]) if guide else z, step).float()
        m, c = images.shape[:2]
        patches = images.view(m, c, S // P, P, S // P, P).permute(0, 2, 4, 3, 5, 1)
        tokens = patches.reshape(m, (S // P) ** 2, P * P * c).contiguous()
        noise = z if noise is None else noise
        row = self.table[step]
        return guided_step(tokens, z, x0_before, noise, SCALES, row, self.channels, P)


def draw(step: int) -> Tensor:
    return torch.randn(N, C, S, S, generator=torch.Generator().manual_seed(100 + step))


def both(
    name: str, schedule: Schedule, learned: bool, eta: float, channels: int = 3,
    interval: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The latents of the written sampler in float64, and those of the fused one in float32."""
    model, guides = Model(schedule, learned), in_interval(interval, schedule.sigmas)
    options = {"eta": eta} if name == "ddim" else {}
    expected = SAMPLERS[name].function(
        guided(model, SCALES, channels, guides), draw(-1).double(), schedule, draw, **options
    )
    table = step_coefficients(name, schedule, learned, eta)
    fused, seen = Fused(model, table, channels), list[int]()
    z = sample_fused(fused, draw(-1), uses_noise(table), guides, draw, lambda k, _: seen.append(k),
                     clipping(name, schedule))  # fmt: skip
    assert seen == list(range(len(schedule)))
    return expected, z


@pytest.mark.parametrize(("channels", "interval"), [(3, None), (4, (0.3, 5.0))])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(
    ("name", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7), ("dpm++", 0.0)]
)
@pytest.mark.parametrize("steps", [1, 2, 12])
def test_equals_the_written_samplers(
    steps: int, name: str, eta: float, learned: bool, channels: int,
    interval: tuple[float, float] | None,
) -> None:  # fmt: skip
    schedule = make_schedule(steps, "linspace")
    expected, z = both(name, schedule, learned, eta, channels, interval)
    assert relative_error(z, expected) < 2e-5
    draws = uses_noise(step_coefficients(name, schedule, learned, eta)).tolist()
    assert draws == [name == "ddpm" or eta > 0] * (steps - 1) + [False]


@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize("variance", ["model", "fixed_small"])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++"])
def test_the_prediction_changes_nothing(
    name: str, learned: bool, variance: str, clip: float | None
) -> None:
    results: list[Tensor] = []
    for prediction in ("epsilon", "v_prediction", "sample"):
        diffusion = Diffusion(prediction=prediction, variance=variance, clip=clip)  # pyright: ignore[reportArgumentType]
        results += both(name, make_schedule(12, "leading", diffusion), learned, 0.5)
    assert results[0].abs().max() > 0.5
    for other in results[1:]:
        assert relative_error(other, results[0]) < 5e-5
