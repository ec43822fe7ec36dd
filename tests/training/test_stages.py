"""What the steps of training are given: gradients of the bfloat16 forward pass, and every draw."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_dit
from torch import Tensor, nn

from dit_engine.training.data import ImageSet
from dit_engine.training.dit_stage import forward_bf16, train_denoiser
from dit_engine.training.loop import Budget, LoopSettings
from dit_engine.training.vae_stage import normalise_latents, train_decoder, vae_loss
from dit_engine.vae import AutoencoderKL, VAEConfig

BAR = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))


def test_gradients_reach_the_float32_weights_and_point_the_same_way() -> None:
    model = tiny_dit()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 4, 8, 8, generator=generator)
    target = torch.randn(4, 8, 8, 8, generator=generator)
    t, y = torch.tensor([0, 100, 500, 999]), torch.tensor([0, 3, 9, 10])

    def gradients(half: bool) -> dict[str, torch.Tensor]:
        model.zero_grad()
        out = forward_bf16(model, x, t, y).float() if half else model(x, t, y)
        assert out.shape == target.shape
        ((out - target) ** 2).mean().backward()
        return {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}

    exact, rounded = gradients(half=False), gradients(half=True)
    assert exact.keys() == rounded.keys()
    for name, gradient in exact.items():
        assert rounded[name].dtype == torch.float32
        error = (rounded[name] - gradient).norm() / gradient.norm()
        assert error < 0.1, (name, error)  # bfloat16 has 8 bits: 0.4 % an operation


STEPS, BATCH, CLASSES = 40, 64, 8


class Recorder(nn.Module):
    """A network of one weight that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.seen.append((x.float(), t, y))
        return x * self.weight


def recorded(directory: Path, mean: float, deviation: float) -> tuple[Tensor, Tensor, Tensor]:
    """What the network is given when all latents are alike: x (steps, N, 2, 4, 4), t, y."""
    shape = (CLASSES, 2, 4, 4)
    latents = torch.full(shape, mean), torch.full(shape, deviation)
    model, settings = Recorder(), LoopSettings(Budget(steps=STEPS), 1e-9)
    train_denoiser(model, CLASSES, latents, torch.arange(CLASSES), settings, directory, BATCH)
    x, t, y = (torch.stack(part) for part in zip(*model.seen, strict=True))
    assert x.shape == (STEPS, BATCH, *shape[1:]) and t.shape == y.shape == (STEPS, BATCH)
    return x, t, y


def assert_standard_and_new_at_every_step(draws: Tensor) -> None:
    """draws (steps, N, …): of N(0, 1), independent over steps and over the batch."""
    steps = draws.flatten(1)
    n = steps.numel()
    assert abs(steps.mean()) < 4.5 * n**-0.5
    assert abs(steps.square().mean() - 1) < 4.5 * (2 / n) ** 0.5
    for rows in (steps, draws.flatten(2).transpose(0, 1).flatten(1)):
        correlations = (rows @ rows.T / rows.shape[1]).fill_diagonal_(0)
        assert correlations.abs().max() < 6 * rows.shape[1] ** -0.5


def test_labels_time_steps_and_noise_are_drawn_anew_at_every_step(tmp_path: Path) -> None:
    x, t, y = recorded(tmp_path, 0.0, 0.0)
    # A tenth of the labels are the null class.
    share, deviation = (y == CLASSES).float().mean(), (0.1 * 0.9 / y.numel()) ** 0.5
    assert abs(share - 0.1) < 4 * deviation
    # The others are each of the classes alike, and which are dropped differs from step to step.
    counts = torch.bincount(y.flatten(), minlength=CLASSES + 1)[:CLASSES] / y.numel()
    p = 0.9 / CLASSES
    assert (counts - p).abs().max() < 4.5 * (p * (1 - p) / y.numel()) ** 0.5
    assert len({tuple(row.tolist()) for row in y == CLASSES}) == STEPS
    counts = torch.histc(t.float(), 10, 0, 1000) / t.numel()
    assert (counts - 0.1).abs().max() < 4.5 * (0.09 / t.numel()) ** 0.5
    assert len({tuple(row.tolist()) for row in t}) == STEPS
    scale = (1 - torch.from_numpy(BAR)[t]).sqrt().float()
    assert_standard_and_new_at_every_step(x / scale[..., None, None, None])


def test_latents_are_drawn_anew_from_their_deviations_at_every_step(tmp_path: Path) -> None:
    large = 1e4  # beside which the noise is nothing
    x, t, _ = recorded(tmp_path, 3 * large, large)
    x0 = x / torch.from_numpy(BAR)[t].sqrt().float()[..., None, None, None]
    clear = BAR[999] ** 0.5 * large  # the least share of x0 in x, in units of the noise
    assert clear > 50
    assert_standard_and_new_at_every_step(x0 / large - 3)


def test_the_latents_that_are_decoded_are_drawn_anew_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the decoder's training and of the autoencoder's."""
    vae = AutoencoderKL(VAEConfig(block_out_channels=(8, 8), norm_num_groups=4))
    seen: list[Tensor] = []
    decode = AutoencoderKL.decode

    def watched(self: AutoencoderKL, z: Tensor) -> Tensor:
        seen.append(z.detach().float())
        return decode(self, z)

    monkeypatch.setattr(AutoencoderKL, "decode", watched)
    data = ImageSet(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, int), ("a",))
    latents = torch.full((4, 4, 4, 4), 3.0), torch.full((4, 4, 4, 4), 2.0)
    train_decoder(vae, data, latents, LoopSettings(Budget(steps=12), 1e-9), tmp_path, 16)
    assert_standard_and_new_at_every_step((torch.stack(seen[:12]) - 3) / 2)
    seen.clear()
    shape = (16, 4, 4, 4)
    encoded = torch.full(shape, 3.0), torch.full(shape, 2 * math.log(2.0))
    monkeypatch.setattr(vae, "encode", lambda _: encoded)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        vae_loss(vae, torch.zeros(16, 3, 8, 8), generator, 0.0)
    assert_standard_and_new_at_every_step((torch.stack(seen) - 3) / 2)


def test_normalised_latents_have_unit_variance_and_decode_to_the_same_images() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(VAEConfig(block_out_channels=(8, 8), norm_num_groups=4)).double().eval()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    data = ImageSet(pixels, np.zeros(64, int), ("noise",))
    images = data.tensor(np.arange(64)).double()
    with torch.no_grad():
        mean, log_variance = vae.encode(images)
        rebuilt = vae.decode(mean)
        std = mean.std(dim=(0, 2, 3), keepdim=True)
        vae.float()
        normalise_latents(vae, data)
        vae.double()
        after, log_after = vae.encode(images)
        assert torch.allclose(after.mean(dim=(0, 2, 3)), torch.zeros(4).double(), atol=1e-4)
        assert torch.allclose(after.std(dim=(0, 2, 3)), torch.ones(4).double(), atol=1e-4)
        assert torch.allclose(log_after, log_variance - 2 * std.log(), atol=1e-4)
        assert torch.allclose(vae.decode(after), rebuilt, atol=1e-4)
