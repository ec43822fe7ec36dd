"""A published size with random weights, and what its outputs must be."""

from __future__ import annotations

from dataclasses import replace

import torch

from dit_bench.cost import dit_cost, total
from dit_bench.cpu_vae import random_vae
from dit_bench.gpu_contenders import Evaluate
from dit_bench.operator_checks import relative_error
from dit_engine.backends import Backend
from dit_engine.config import ModelConfig
from dit_engine.engine import Engine
from dit_engine.model import DiT
from dit_engine.vae import AutoencoderKL, VAEConfig

TIMESTEPS = (999, 400)
"""Outputs are compared at both, with latents of their own."""


class Inputs:
    """Latents, labels and time steps of one batch, with the float32 eager model's outputs."""

    def __init__(self, engine: Engine, batch: int) -> None:
        config, device = engine.config, engine.device
        draw = torch.Generator(device).manual_seed(batch)
        shape = (batch, config.in_channels, config.input_size, config.input_size)
        self.xs = [torch.randn(shape, generator=draw, device=device) for _ in TIMESTEPS]
        self.x = self.xs[1]
        self.labels = torch.randint(config.label_rows, (batch,), generator=draw, device=device)
        self.timesteps = torch.tensor(TIMESTEPS, device=device)
        exact = own_backend(engine, "eager", "fp32").prepare(self.labels, self.timesteps)
        self.exact = [exact(x, step).clone() for step, x in enumerate(self.xs)]

    def error(self, run: Evaluate, step: int) -> float:
        return relative_error(run(self.xs[step], step), self.exact[step])


def own_backend(engine: Engine, name: str, precision: str) -> Backend:
    """The engine's own, so that `Engine.generate` finds it ready; made as it would make it."""
    with torch.inference_mode(False):
        return engine._backend(name, precision)


def random_model(config: ModelConfig, device: torch.device) -> DiT:
    """Every weight random, scaled by the number of its inputs, so that activations stay near 1."""
    draw = torch.Generator(device).manual_seed(0)
    with torch.inference_mode(False):
        with device:
            model = DiT(config)
        model = model.to(device).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                scale = 0.5 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
                noise = torch.randn(parameter.shape, generator=draw, device=device)
                parameter.copy_(noise * scale)
    return model


def with_numerics(model: DiT, numerics: str) -> DiT:
    """A twin on the same weights that computes, say, "diffusers" numerics."""
    with torch.inference_mode(False), torch.no_grad():
        with torch.device("meta"):
            twin = DiT(replace(model.config, numerics=numerics))
        twin.load_state_dict(model.state_dict(), assign=True)
        return twin.eval().requires_grad_(False)


def random_decoder(config: VAEConfig, device: torch.device) -> AutoencoderKL:
    """A VAE of random weights, in float32 on ``device``."""
    with torch.inference_mode(False):
        return random_vae(config).to(device)


def loop_flops(config: ModelConfig) -> int:
    """Of one row's forward without what depends on (time step, label) alone."""
    parts = dit_cost(config)
    return total({k: v for k, v in parts.items() if k not in ("conditioning", "adaln")}).flops
