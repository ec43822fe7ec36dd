"""Engine: labels in, images out. `generate` is plan, sample, decode, in this order."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_engine._version import __version__
from dit_engine.arguments import names_ours, positive, shown
from dit_engine.backends import Backend, create_backend
from dit_engine.checkpoint import build_model, build_vae, load_checkpoint
from dit_engine.decode import LatentDecoder, check_latents
from dit_engine.io.provenance import recorded
from dit_engine.labels import check_names
from dit_engine.model import DiT
from dit_engine.plan import Plan, make_plan
from dit_engine.results import Generation, Progress
from dit_engine.runtime import in_halves, limited_threads, neutral, parse_device, survive_forks
from dit_engine.sampling.loop import sample
from dit_engine.vae import AutoencoderKL


class Engine:
    """A DiT, its VAE and the means to run them. Safe to share between threads.

    Args:
        model: the reference module, in any dtype; backends make the copies that they need, so
            it stays where it is (a memory-mapped file costs nothing).
        vae: the autoencoder, or None for a latents-only engine.
        label_names: one name per class, if there are names.
        device: "cpu", "cuda", …; None chooses CUDA where there is one.
        max_batch_size: more images than this are made in several batches.
        threads: CPU threads while generating, 1 or more; None leaves torch's setting alone.
        sources: where the weights came from and how they were read, recorded with every result.
    """

    def __init__(
        self,
        model: DiT,
        vae: AutoencoderKL | None = None,
        label_names: Sequence[str] | None = None,
        device: torch.device | str | None = None,
        max_batch_size: int = 32,
        threads: int | None = None,
        sources: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, DiT):
            raise ValueError(f"model {shown(model)} is not a dit_engine.model.DiT")
        if vae is not None and not isinstance(vae, AutoencoderKL):
            raise ValueError(f"vae {shown(vae)} is not a dit_engine.vae.AutoencoderKL")
        if label_names is not None:
            label_names = check_names("label_names", label_names, model.config.num_classes)
        self.threads = None if threads is None else positive("threads", threads)
        self.device = parse_device(device)
        self.model = model.eval()
        self.vae = None if vae is None else vae.eval()
        self.config = model.config
        self.label_names = label_names
        self.max_batch_size = positive("max_batch_size", max_batch_size)
        sources = {"model": "memory"} if sources is None else sources
        if not isinstance(sources, dict) or not all(isinstance(name, str) for name in sources):
            raise ValueError(f"sources {shown(sources)} is not a dict of recorded values by name")
        self.sources: dict[str, Any] = dict(sources)
        self._start()

    def _start(self) -> None:
        """Make what is never copied or pickled: each engine has its own."""
        self._decode = None if self.vae is None else LatentDecoder(self.vae, self.device)
        self._backends: dict[tuple[str, str], Backend] = {}
        self._lock = threading.Lock()
        self._origin = self.sources | {"numerics": self.config.numerics, "version": __version__}
        if diffusion := self.config.diffusion.record():  # empty for the published one
            self._origin["diffusion"] = diffusion
        survive_forks()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        with neutral():  # a tensor copied in inference mode could never be trained or changed
            for name in ("model", "vae"):
                module = getattr(self, name)
                if module is not None and any(p.is_inference() for p in module.parameters()):
                    setattr(self, name, copy.deepcopy(module))
        self._start()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        vae: str | Path | None = None,
        numerics: str | None = None,
        num_heads: int | None = None,
        prediction: str | None = None,
        check_finite: bool = False,
        vae_scaling_factor: float | None = None,
        vae_shift_factor: float | None = None,
        vae_groups: int | None = None,
        device: torch.device | str | None = None,
        max_batch_size: int = 32,
        threads: int | None = None,
        record_paths: bool = False,
    ) -> Engine:
        """Load ``source``: "builtin", a file, a directory, or a hub id ("owner/name").

        Args:
            vae: a VAE to use in place of the source's own (a file, a directory or a hub id).
            numerics: "official" or "diffusers"; None takes what the source was made for.
            num_heads: needed for bare weight files whose width is not a published one.
            prediction: "epsilon", "v_prediction" or "sample", for files that do not tell what the
                model predicts; None is epsilon there.
            check_finite: look through every weight for NaN and infinity.
            vae_scaling_factor, vae_shift_factor, vae_groups: for a VAE file without a config.json,
                or in place of its values (see `load_checkpoint`).
            device: "cpu", "cuda", …; None chooses CUDA where there is one.
            max_batch_size: more images than this are made in several batches.
            threads: CPU threads while generating, 1 or more; None leaves torch's setting alone.
            record_paths: record the whole paths of files in results, not only their names.

        Raises:
            ValueError, OSError: one line that says what is wrong with the source.
        """
        loading: dict[str, Any] = {
            "num_heads": num_heads, "prediction": prediction, "vae_groups": vae_groups,
            "vae_scaling_factor": vae_scaling_factor, "vae_shift_factor": vae_shift_factor,
        }  # fmt: skip
        checkpoint = load_checkpoint(
            source, vae=vae, numerics=numerics, check_finite=check_finite, **loading
        )
        told = str if record_paths else recorded
        sources = {"model": told(source), "vae": None if vae is None else told(vae)} | loading
        return cls(
            build_model(checkpoint),
            build_vae(checkpoint),
            checkpoint.label_names,
            device,
            max_batch_size,
            threads,
            {name: value for name, value in sources.items() if value is not None},
        )

    def __repr__(self) -> str:
        c = self.config
        return (
            f"Engine(model={self.sources['model']!r}, depth={c.depth}, "
            f"hidden_size={c.hidden_size}, patch_size={c.patch_size}, "
            f"num_classes={c.num_classes}, image_size={self.image_size}, device='{self.device}')"
        )

    @property
    def image_size(self) -> int | None:
        """Pixels along a side of an image; None without a VAE."""
        return None if self.vae is None else self.config.input_size * self.vae.config.downsampling

    @names_ours
    def generate(
        self,
        labels: int | str | Iterable[int | str],
        *,
        steps: int | None = None,
        sampler: str = "ddpm",
        spacing: str | None = None,
        eta: float = 0.0,
        guidance_scale: float | Sequence[float] | Tensor = 4.0,
        guidance_channels: int | None = 3,
        guidance_interval: tuple[float, float] | None = None,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        noise: str = "per-image",
        latents: Tensor | None = None,
        step_noise: Tensor | None = None,
        backend: str = "auto",
        precision: str = "fp32",
        output: str | None = None,
        callback: Callable[[Progress], None] | None = None,
    ) -> Generation:
        """Make one image for every label.

        Args:
            labels: class numbers or names, one or many.
            steps: denoising steps, 1 to the model's training steps (1000 of a published one);
                None is the sampler's usual count.
            sampler: "ddpm" (the reference's), "ddim", or "dpm++" (good from 20 steps).
            spacing: which of the model's steps are taken (see `space_timesteps`); None is the
                sampler's usual choice. DiTPipeline's is "leading".
            eta: for ddim only; 0 is deterministic, 1 is as noisy as ddpm.
            guidance_scale: classifier-free guidance, one number or one per image; 1 is none.
            guidance_channels: how many latent channels are guided; None is all, 3 the reference.
            guidance_interval: (low, high) noise levels σ = sqrt((1-ᾱ)/ᾱ) between which guidance
                is on (Kynkäänniemi et al. 2024); outside, the unconditional half is not computed.
            seed: image i is made from seed + i. None, without seeds, is a random one (recorded).
            seeds: one per image. An image depends on its own label, seed and settings only.
            noise: "per-image", or "official": drawn as the reference does, the batch as a whole.
            latents: (N, C, S, S) to start from, in place of noise.
            step_noise: (steps, N, C, S, S), draw k for the k-th step taken.
            backend: "auto", "lean", "eager" or "compile", or one that a package adds (dit_export:
                "onnxruntime", "tensorrt" or "trt", "triton://host:port"); it works or raises.
                While "compile" compiles, PYTHONSAFEPATH is set in this process's environment.
            precision: "fp32", "bf16" or "fp16", of the model; with "lean" also "int8" (on the CPU)
                and "fp8" (on CUDA), which quantise the blocks' matrix products. The sampler is
                always float32. The VAE decodes in float32 for "fp32" and "fp16", otherwise in
                bfloat16. GPUs before Ampere have no bfloat16: they refuse "bf16" and decode in
                float32.
            output: "pil", "np", "pt" or "latent"; None is "pil", or "latent" without a VAE.
            callback: called with a `Progress` after every step.

        Raises:
            ValueError: an argument out of its range; the message names it and what is allowed.
            BackendUnavailable: a backend that cannot run here.
        """
        plan = self.plan(
            labels, steps=steps, sampler=sampler, spacing=spacing, eta=eta,
            guidance_scale=guidance_scale, guidance_channels=guidance_channels,
            guidance_interval=guidance_interval, seed=seed, seeds=seeds, noise=noise,
            latents=latents, step_noise=step_noise, backend=backend, precision=precision,
            output=output,
        )  # fmt: skip
        if callback is not None and not callable(callback):
            raise ValueError(f"callback {shown(callback)} is not callable")
        splittable = plan.noise != "official"  # it draws for the whole batch at once
        if not splittable and len(plan) > self.max_batch_size:
            raise ValueError(
                f"noise {plan.noise!r} draws for the batch as a whole: {len(plan)} labels exceed "
                f"max_batch_size {self.max_batch_size}"
            )
        gradients = torch.is_grad_enabled()

        def run(first: int, count: int) -> Tensor:
            part = plan.part(first, count)

            def report(step: int, z: Tensor) -> None:
                if callback is None:
                    return
                with torch.inference_mode(False), torch.set_grad_enabled(gradients):
                    own = z.clone()  # an ordinary tensor, which no later step reads
                    steps = len(plan.schedule)
                    callback(Progress(step + 1, steps, first, count, len(plan), own))

            z = sample(runner, part, self.device, report)
            again = partial(sample, runner, part, self.device)
            check_latents(z, again, len(plan.schedule), part.names)
            return z

        with neutral(self.device), limited_threads(self.threads):
            runner = self._backend(plan.backend, plan.precision)
            with torch.inference_mode():
                z = torch.cat(in_halves(run, len(plan), self.max_batch_size, splittable))
                if plan.output == "latent":
                    images = z.cpu()
                else:
                    assert self._decode is not None
                    images = self._decode.images(z, plan, runner.decoder, self.max_batch_size)
            if isinstance(images, Tensor):
                images = images.clone()  # an ordinary tensor, which can be changed and trained on
        return plan.result(images)

    def plan(self, labels: int | str | Iterable[int | str], **options: Any) -> Plan:
        """What `generate` would do; nothing is run. ``options`` are all of its keywords except
        ``callback``, and none of them has a default here."""
        origin = copy.deepcopy(self._origin)  # because the caller may change the result
        has_vae = self.vae is not None
        return make_plan(labels, self.config, self.label_names, origin, has_vae, **options)

    def _backend(self, name: str, precision: str) -> Backend:
        with self._lock:
            if (name, precision) not in self._backends:
                self._backends[name, precision] = create_backend(
                    name, self.model, precision, self.device
                )
            return self._backends[name, precision]
