"""One forward pass, one guided step, one decode and one generation, by each contender.

Each function takes no arguments, and returns float32 results in the device's memory, as a sampler
needs them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_bench import peers
from dit_bench.contenders import FORMS, Function, float_dtype
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
from dit_engine.sampling.schedule import make_schedule

STEPS = 20
"""Of the schedule that the timed step belongs to, and over which the conditioning is spread."""
STEP = 7  # the step that is timed
SCALE, CHANNELS = 4.0, 3  # of guidance


class Networks:
    """An engine, and copies of its reference model in the dtypes that contenders need.

    built_mib: memory that building each contender took, see `dit_bench.contenders.Built`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.built_mib: dict[str, float] = {}
        self._twins: dict[torch.dtype, DiT] = {}

    def model(self, dtype: torch.dtype) -> DiT:
        """The model in ``dtype``: all contenders that keep torch's layout share its tensors."""
        if dtype not in self._twins:
            with torch.inference_mode(False):
                self._twins[dtype] = placed(self.engine.model, dtype, self.engine.device)
        return self._twins[dtype]

    def backend(self, name: str, precision: str) -> Backend:
        """The engine's own backend, made as in `Engine.generate`, which then finds it ready."""
        with torch.inference_mode(False):
            return self.engine._backend(name, precision)


class Work:
    """Random inputs for N images on the engine's device, and functions that compute with them.

    A forward has N rows and a guided step 2N, of which half are unlabelled.
    """

    def __init__(self, networks: Networks, images: int) -> None:
        self.networks, self.engine, self.images = networks, networks.engine, images
        config, device = self.engine.config, self.engine.device
        draw = torch.Generator().manual_seed(images)
        self.seeds = list(range(images))  # of whole generations
        self.x = torch.randn(images, *config.latent_shape, generator=draw).to(device)
        self.classes = torch.randint(config.num_classes, (images,), generator=draw).to(device)
        self.labels = self.classes.clone()  # (N,)
        self.labels[(images + 1) // 2 :] = config.null_class
        self.schedule = make_schedule(STEPS, diffusion=config.diffusion)
        self.timesteps = torch.tensor(self.schedule.timesteps, device=device)  # (K,)
        self.t = self.timesteps[STEP].expand(images).contiguous()  # (N,)

    def forward(self, name: str, precision: str) -> Function:
        """The network on all rows at once, by a backend, a library or a compiler."""
        dtype, device = float_dtype(precision), self.engine.device
        if name == "unet":
            return peers.unet_forward(self.images, device, dtype)
        if name == "openvino":
            # The network below its conditioning, which is computed before the timing begins: in a
            # bf16 graph, OpenVINO would round the angles of the time step's sinusoids, up to 999
            # radians, to 8 bits, and so compute another function.
            model = self.engine.model
            with torch.inference_mode(False), torch.no_grad():
                c = model.condition(self.t, self.labels)  # (N, D)
            return _openvino(model, "forward_conditioned", (self.x, c), precision)
        if name not in ("eager", "compile", "diffusers", *FORMS):
            denoise = self.networks.backend(name, precision).prepare(self.labels, self.timesteps)
            if name == "lean" and device.type == "cuda":  # in a graph, as its sampler steps are
                return peers.graphed(lambda: denoise(self.x, STEP), device)
            return lambda: denoise(self.x, STEP)
        model = self.networks.model(dtype)
        if name == "diffusers":
            theirs = peers.diffusers_transformer(model)
            return lambda: theirs(
                self.x.to(dtype), timestep=self.t, class_labels=self.labels
            ).sample.float()
        inputs = (self.x.to(dtype), self.t, self.labels)
        if name == "graph":
            return peers.graphed(lambda: model(*inputs).float(), device)
        if name == "autotuned blocks graph":
            blocks = peers.autotuned_blocks(model)
            return peers.graphed(lambda: blocks(*inputs).float(), device)
        run = model if name == "eager" else peers.compiled(model, name, *inputs)
        return lambda: run(self.x.to(dtype), self.t, self.labels).float()

    def start(self, name: str, precision: str) -> Function:
        """The first step, with the conditioning of all ``STEPS`` before it."""
        backend = self.networks.backend(name, precision)
        return lambda: backend.prepare(self.labels, self.timesteps)(self.x, 0)

    def guided_step(self, name: str, precision: str) -> Function:
        """One step of ddpm under guidance by backend ``name``, as `Engine.generate` takes it.

        It is computed like a schedule's last step, so no noise is drawn.
        """
        config, device = self.engine.config, self.engine.device
        arrays = ("timesteps", "alphas_cumprod", "alphas_cumprod_prev", "betas")
        part = {name: getattr(self.schedule, name)[STEP : STEP + 1] for name in arrays}
        one = replace(self.schedule, **part)
        null = torch.full_like(self.classes, config.null_class)
        conditions = torch.cat([self.classes, null]), self.timesteps[STEP : STEP + 1]
        scales = torch.full((self.images,), SCALE, dtype=torch.float64)
        channels = min(CHANNELS, config.in_channels)
        backend = self.networks.backend(name, precision)
        table = step_coefficients("ddpm", one, config.learn_sigma)
        fused = backend.fuse(*conditions, table, scales, channels)
        if fused is not None and (clip := clipping("ddpm", one)) is not None:
            always, draws = np.ones(1, dtype=bool), uses_noise(table)
            return lambda: sample_fused(fused, self.x, draws, always, _no_noise, _ignore, clip)
        if fused is not None:
            # As in the sampling loop, the x0 of a step is x0_before of the next step.
            before = [torch.zeros_like(self.x)]

            def step() -> Tensor:
                z, before[0] = fused.guided_step(self.x, before[0], None, 0, True)
                return z

            return step
        denoise = guided(backend.prepare(*conditions), scales.to(device), channels)
        return lambda: ddpm(denoise, self.x, one, _no_noise)

    def decode(self, name: str, precision: str) -> Function:
        """The VAE's decoder of lean, diffusers, OpenVINO or torch.compile; else eager torch's."""
        decoder: Any = self.engine._decode
        vae = self.engine.vae
        assert vae is not None
        if name == "openvino":
            return _openvino(vae, "decode", (vae.config.denormalise(self.x),), precision)
        if name not in ("diffusers", "compile vae"):
            return lambda: decoder(self.x, precision, LeanDecoder if name == "lean" else None)
        dtype = float_dtype(decoder_precision(precision))
        own = peers.channels_last(copy.deepcopy(vae).to(self.engine.device, dtype))
        if name == "compile vae":
            decode: Any = compile_static(lambda z: own.decode(z))
        else:
            theirs = peers.diffusers_autoencoder(own)
            decode = lambda z: theirs.decode(z).sample  # noqa: E731

        def run() -> Tensor:
            z = vae.config.denormalise(self.x).to(dtype, memory_format=torch.channels_last)
            return decode(z).float()

        return run

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
        options: dict[str, Any] = {"steps": steps, "sampler": sampler, "callback": callback}
        options["output"] = "latent" if self.engine.vae is None else "pt"
        return partial(
            self.engine.generate, self.classes.tolist(), seeds=self.seeds, backend=name,
            precision=precision, **options,
        )  # fmt: skip

    def generated(self, generation: Generation) -> Tensor:
        """The part of a generation that is compared: images in [-1, 1], as the decoder gives them
        (in [0, 1] the mean of 0.5 would hide errors), or latents."""
        made = generation.images
        return made if self.engine.vae is None else made * 2 - 1


def decoder_precision(precision: str) -> str:
    """The precision in which the engine decodes: Stable Diffusion's decoder overflows float16."""
    return "fp32" if precision in ("fp32", "fp16") else "bf16"


def _openvino(module: Any, method: str, inputs: tuple[Tensor, ...], precision: str) -> Function:
    exported, threads = peers.Method(module, method), torch.get_num_threads()
    return peers.openvino_function(exported, inputs, precision, threads)


def _no_noise(k: int) -> Tensor:
    raise AssertionError("a last step draws no noise")


def _ignore(k: int, z: Tensor) -> None:
    pass
