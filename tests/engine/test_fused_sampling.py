"""One affine update a step against the samplers as they are written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numerics import relative_error
from torch import Tensor

from dit_engine.plan import in_interval
from dit_engine.sampling.coefficients import step_coefficients, uses_noise
from dit_engine.sampling.guidance import guided
from dit_engine.sampling.loop import sample_fused
from dit_engine.sampling.samplers import SAMPLERS
from dit_engine.sampling.schedule import make_schedule
from dit_kernels import guided_step

N, C, S, P = 3, 4, 8, 2
SCALES = torch.tensor([1.0, 4.0, 1.5])


class Model:
    """A smooth random function of (z, k), as images and as the tokens that unpatchify to them."""

    def __init__(self, learned: bool) -> None:
        self.learned = learned

    def images(self, z: Tensor, k: int) -> Tensor:
        rows = torch.arange(len(z)).view(-1, 1, 1, 1)
        eps = torch.tanh(z * (1 + 0.1 * rows)) + 0.01 * k
        return torch.cat([eps, torch.tanh(3 * z)], 1) if self.learned else eps

    def tokens(self, z: Tensor, k: int) -> Tensor:
        images = self.images(z, k)
        m, c = images.shape[:2]
        patches = images.view(m, c, S // P, P, S // P, P).permute(0, 2, 4, 3, 5, 1)
        return patches.reshape(m, (S // P) ** 2, P * P * c).contiguous()


class Fused:
    def __init__(self, model: Model, table: np.ndarray, channels: int) -> None:
        self.model, self.channels = model, channels
        self.table = torch.from_numpy(table).float()

    def guided_step(
        self, z: Tensor, x0: Tensor, noise: Tensor, step: int, guide: bool
    ) -> tuple[Tensor, Tensor]:
        tokens = self.model.tokens(torch.cat([z, z]) if guide else z, step)
        return guided_step(tokens, z, x0, noise, SCALES, self.table[step], self.channels, P)


class Draws:
    def start(self) -> Tensor:
        return self(-1)

    def __call__(self, step: int) -> Tensor:
        return torch.randn(N, C, S, S, generator=torch.Generator().manual_seed(100 + step))


@pytest.mark.parametrize("interval", [None, (0.3, 5.0)])
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(
    ("name", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7), ("dpm++", 0.0)]
)
@pytest.mark.parametrize("steps", [1, 2, 12])
def test_equals_the_plain_samplers(
    steps: int,
    name: str,
    eta: float,
    learned: bool,
    channels: int,
    interval: tuple[float, float] | None,
) -> None:
    schedule = make_schedule(steps, "linspace")
    model, noise = Model(learned), Draws()
    guides = in_interval(interval, schedule.sigmas)
    denoise = guided(model.images, SCALES, channels, guides)
    options = {"eta": eta} if name == "ddim" else {}
    # In float64 the samplers themselves are exact but for their float32 coefficients.
    expected = SAMPLERS[name].function(denoise, noise.start().double(), schedule, noise, **options)
    table = step_coefficients(name, schedule, learned, eta)
    seen: list[int] = []
    z = sample_fused(Fused(model, table, channels), noise.start(), uses_noise(table), guides, noise,
                     lambda k, z: seen.append(k))  # fmt: skip
    assert seen == list(range(steps))
    assert relative_error(z, expected) < 2e-5


def test_only_ddpm_and_stochastic_ddim_draw() -> None:
    schedule = make_schedule(5)
    for name, eta, draws in (("ddpm", 0.0, True), ("ddim", 0.5, True), ("ddim", 0.0, False),
                             ("dpm++", 0.0, False)):  # fmt: skip
        drawn = uses_noise(step_coefficients(name, schedule, True, eta))
        assert drawn.tolist() == [draws] * 4 + [False]
