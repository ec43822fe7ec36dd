"""One forward pass, one guided step and one decode, by whoever can compute them.

Each function takes nothing, and gives float32 results on the device's memory: what a sampler
would be given. N images, M rows of a forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_bench.cpu_forward import _Conditioned
from dit_bench.peers import Function, diffusers_transformer, openvino_function
from dit_bench.subjects import float_dtype
from dit_engine.backends import Backend
from dit_engine.backends.compile import compile_static
from dit_engine.backends.eager import placed
from dit_engine.backends.lean.vae import LeanDecoder
from dit_engine.engine import Engine, Generation, Progress
from dit_engine.model import DiT
from dit_engine.sampling.coefficients import clipping, step_coefficients, uses_noise
from dit_engine.sampling.guidance import guided
from dit_engine.sampling.loop import sample_fused
from dit_engine.sampling.samplers import ddpm
from dit_engine.sampling.schedule import Schedule, make_schedule

STEPS = 20  # of the schedule that the timed step belongs to
STEP = 7
SCALE, CHANNELS = 4.0, 3  # of guidance


def own_backend(engine: Engine, name: str, precision: str) -> Backend:
    """The engine's own, so that `Engine.generate` finds it ready; made as it would make it."""
    with torch.inference_mode(False):
        return engine._backend(name, precision)


class Networks:
    """An engine, and its reference model in every dtype that someone asks for."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._twins: dict[torch.dtype, DiT] = {}

    def model(self, dtype: torch.dtype) -> DiT:
        """The same tensors for everyone who keeps torch's layout."""
        if dtype not in self._twins:
            with torch.inference_mode(False):
                self._twins[dtype] = placed(self.engine.model, dtype, self.engine.device)
        return self._twins[dtype]


class Work:
    """Random inputs for N images on the engine's device, and functions that compute with them.

    A forward has N labelled rows; a guided step has 2N, of which half are unlabelled.
    """

    def __init__(self, networks: Networks, images: int) -> None:
        engine = networks.engine
        self.model = networks.model
        config, device = engine.config, engine.device
        draw = torch.Generator().manual_seed(images)
        shape = (images, config.in_channels, config.input_size, config.input_size)
        self.engine, self.images = engine, images
        self.seeds = list(range(images))  # of whole generations
        self.x = torch.randn(shape, generator=draw).to(device)
        self.labels = torch.randint(config.num_classes, (images,), generator=draw).to(device)
        self.schedule = make_schedule(STEPS, diffusion=config.diffusion)
        self.timesteps = torch.tensor(self.schedule.timesteps, device=device)
        self.t = self.timesteps[STEP].expand(images).contiguous()

    def eager(self, precision: str) -> Function:
        """The reference model on all rows at once."""
        module, dtype = self.model(float_dtype(precision)), float_dtype(precision)
        return lambda: module(self.x.to(dtype), self.t, self.labels).float()

    def backend(self, name: str, precision: str) -> Function:
        denoise = own_backend(self.engine, name, precision).prepare(self.labels, self.timesteps)
        return lambda: denoise(self.x, STEP)

    def compiled(self, precision: str) -> Function:
        """torch.compile of the reference model for this one shape, which is its best case."""
        module, dtype = self.model(float_dtype(precision)), float_dtype(precision)

        def forward(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return module(x, t, y)

        run = compile_static(forward)
        return lambda: run(self.x.to(dtype), self.t, self.labels).float()

    def diffusers(self, precision: str) -> Function:
        """DiTTransformer2DModel on the same tensors; of a model with numerics "diffusers"."""
        numerics = self.engine.config.numerics
        if numerics != "diffusers":
            raise ValueError(f"numerics {numerics!r}: diffusers computes only 'diffusers'")
        dtype = float_dtype(precision)
        theirs = diffusers_transformer(self.model(dtype))

        def run() -> Tensor:
            output = theirs(self.x.to(dtype), timestep=self.t, class_labels=self.labels)
            return output.sample.float()

        return run

    def openvino(self, precision: str) -> Function:
        """The network below its conditioning, which is computed before the timing begins."""
        if self.engine.device.type != "cpu":
            raise ValueError("OpenVINO runs on the CPU here")
        with torch.inference_mode(False), torch.no_grad():
            c = self.engine.model.condition(self.t, self.labels)  # (N, D)
        arguments = (self.x, c)
        module = _Conditioned(self.engine.model)
        return openvino_function(module, arguments, precision, torch.get_num_threads())

    def guided_step(self, name: str, precision: str) -> Function:
        """One step of ddpm under guidance by backend ``name``, as `Engine.generate` takes it.

        It is taken as a schedule's last one, so no noise is drawn.
        """
        config, device = self.engine.config, self.engine.device
        one = one_step(self.schedule, STEP)
        null = torch.full_like(self.labels, config.null_class)
        backend = own_backend(self.engine, name, precision)
        conditions = (
            torch.cat([self.labels, null]),
            torch.tensor(one.timesteps, device=device),
        )
        scales = torch.full((self.images,), SCALE, dtype=torch.float64)
        channels = min(CHANNELS, config.in_channels)
        noise: Any = _no_noise
        table = step_coefficients("ddpm", one, config.learn_sigma)
        fused = backend.fuse(*conditions, table, scales, channels)
        if fused is not None:
            always, draws, clip = np.ones(1, dtype=bool), uses_noise(table), clipping("ddpm", one)
            return lambda: sample_fused(fused, self.x, draws, always, noise, _ignore, clip)
        denoiser = backend.prepare(*conditions)
        denoise = guided(denoiser, scales.to(device), channels)
        return lambda: ddpm(denoise, self.x, one, noise)

    def generation(
        self,
        name: str,
        precision: str,
        steps: int,
        sampler: str,
        callback: Callable[[Progress], object] | None = None,
    ) -> Callable[[], Generation]:
        """`Engine.generate` by backend ``name``: images in [0, 1], latents without a VAE; the same
        labels and noise for every backend."""
        labels = self.labels.tolist()
        options: dict[str, Any] = {"steps": steps, "sampler": sampler, "callback": callback}
        options["output"] = "latent" if self.engine.vae is None else "pt"
        return lambda: self.engine.generate(
            labels, seeds=self.seeds, backend=name, precision=precision, **options
        )

    def generated(self, generation: Generation) -> Tensor:
        """What of a generation is compared: images in [-1, 1], as the decoder gives them (the 0.5
        that lies under those in [0, 1] would hide errors), or latents."""
        made = generation.images
        return made if self.engine.vae is None else made * 2 - 1

    def decode(self, lean: bool, precision: str) -> Function:
        """The VAE's decoder, by the engine: `LatentDecoder`."""
        decoder = self.engine._decode
        assert decoder is not None
        return lambda: decoder(self.x, precision, LeanDecoder if lean else None)

    def diffusers_decode(self, precision: str) -> Function:
        from dit_bench.cpu_vae import channels_last, diffusers_autoencoder

        vae = self.engine.vae
        assert vae is not None
        dtype = decoder_dtype(precision)
        twin = channels_last(copy.deepcopy(vae).to(self.engine.device, dtype))
        theirs, config = diffusers_autoencoder(twin), vae.config

        def run() -> Tensor:
            z = config.denormalise(self.x).to(dtype, memory_format=torch.channels_last)
            return theirs.decode(z).sample.float()

        return run


def one_step(schedule: Schedule, k: int) -> Schedule:
    """A schedule that consists of the ``k``-th step of ``schedule``."""
    part = slice(k, k + 1)
    return replace(
        schedule,
        timesteps=schedule.timesteps[part],
        alphas_cumprod=schedule.alphas_cumprod[part],
        alphas_cumprod_prev=schedule.alphas_cumprod_prev[part],
        betas=schedule.betas[part],
    )


def decoder_dtype(precision: str) -> torch.dtype:
    """What `LatentDecoder` decodes in: Stable Diffusion's decoder overflows float16."""
    return torch.float32 if precision in ("fp32", "fp16") else torch.bfloat16


def _no_noise(k: int) -> Tensor:
    raise AssertionError("a last step draws no noise")


def _ignore(k: int, z: Tensor) -> None:
    pass
