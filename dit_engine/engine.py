"""Engine: labels in, images out. `generate` reads in the order in which things happen."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_engine._version import __version__
from dit_engine.arguments import positive, shown
from dit_engine.backends import Backend, create_backend, resolve_backend
from dit_engine.checkpoint import build_model, build_vae, load_checkpoint
from dit_engine.config import NO_NULL_CLASS
from dit_engine.console.parser import names_ours
from dit_engine.decode import LatentDecoder, to_pil, to_uint8
from dit_engine.finite import check_latents, check_pixels
from dit_engine.io.provenance import recorded
from dit_engine.labels import check_names, resolve_labels
from dit_engine.memory import in_halves
from dit_engine.model import DiT
from dit_engine.results import Generation, Progress
from dit_engine.runtime import limited_threads, neutral, parse_device, survive_forks
from dit_engine.sampling.coefficients import clipping, step_coefficients, uses_noise
from dit_engine.sampling.fused import sample_fused
from dit_engine.sampling.guidance import guided, guided_steps, parse_scales
from dit_engine.sampling.noise import (
    GivenNoise,
    NoiseSource,
    OfficialNoise,
    PerImageNoise,
    given_noise,
)
from dit_engine.sampling.samplers import SAMPLERS
from dit_engine.sampling.schedule import make_schedule
from dit_engine.settings import GenerateSettings, resolve_seeds
from dit_engine.vae import AutoencoderKL


class Engine:
    """A DiT, its VAE and the means to run them. Safe to share between threads.

    Args:
        model: the reference module, in any dtype; backends make the copies that they need, so
            it stays where it is (a memory-mapped file costs nothing).
        vae: the autoencoder, or None for a latents-only engine.
        label_names: one name a class, if there are names.
        device: "cpu", "cuda", …; None chooses CUDA where there is one.
        max_batch_size: more images than this are made in several batches.
        threads: CPU threads while generating, 1 or more; None leaves torch's setting alone.
        sources: where the weights came from, recorded with every result.
    """

    def __init__(
        self,
        model: DiT,
        vae: AutoencoderKL | None = None,
        label_names: Sequence[str] | None = None,
        device: torch.device | str | None = None,
        max_batch_size: int = 32,
        threads: int | None = None,
        sources: dict[str, str] | None = None,
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
        self.loading: dict[str, Any] = {}
        self.sources = {"model": "memory"} if sources is None else _texts("sources", sources)
        self._start()

    def _start(self) -> None:
        """Decoder, backends and lock: what a copy or an unpickled engine makes for itself."""
        self._decode = None if self.vae is None else LatentDecoder(self.vae, self.device)
        self._backends: dict[tuple[str, str], Backend] = {}
        self._lock = threading.Lock()
        survive_forks()

    def __getstate__(self) -> dict[str, Any]:
        made_again = ("_decode", "_backends", "_lock")
        return {name: value for name, value in vars(self).items() if name not in made_again}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        with neutral():  # what was copied in inference mode could never be trained, nor changed
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
            num_heads: for bare weight files of an unpublished width, which do not tell it.
            prediction: "epsilon", "v_prediction" or "sample", for files that do not tell what the
                model predicts; None is epsilon there.
            check_finite: look through every weight for NaN and infinity.
            vae_scaling_factor, vae_shift_factor, vae_groups: of a VAE file without a config.json,
                or in place of what that says (see `load_checkpoint`).
            device: "cpu", "cuda", …; None chooses CUDA where there is one.
            max_batch_size: more images than this are made in several batches.
            threads: CPU threads while generating, 1 or more; None leaves torch's setting alone.
            record_paths: record the whole paths of files in results, not only their names.

        Raises:
            ValueError, OSError: one line that says what is wrong with the source.
        """
        checkpoint = load_checkpoint(
            source,
            vae=vae,
            numerics=numerics,
            num_heads=num_heads,
            prediction=prediction,
            check_finite=check_finite,
            vae_scaling_factor=vae_scaling_factor,
            vae_shift_factor=vae_shift_factor,
            vae_groups=vae_groups,
        )
        told = str if record_paths else recorded
        sources = {"model": told(source)} | ({} if vae is None else {"vae": told(vae)})
        engine = cls(
            build_model(checkpoint),
            build_vae(checkpoint),
            checkpoint.label_names,
            device,
            max_batch_size,
            threads,
            sources,
        )
        loading = {
            "num_heads": num_heads,
            "prediction": prediction,
            "vae_scaling_factor": vae_scaling_factor,
            "vae_shift_factor": vae_shift_factor,
            "vae_groups": vae_groups,
        }  # recorded as the sources are
        engine.loading = {name: value for name, value in loading.items() if value is not None}
        return engine

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
            eta: ddim only: 0 is deterministic, 1 as noisy as ddpm.
            guidance_scale: classifier-free guidance, one number or one an image; 1 is none.
            guidance_channels: how many latent channels are guided; None is all, 3 the reference.
            guidance_interval: (low, high) noise levels σ = sqrt((1-ᾱ)/ᾱ) between which guidance
                is on (Kynkäänniemi et al. 2024); outside, the unconditional half is not computed.
            seed: image i is made from seed + i. Neither seed nor seeds: a random one, recorded.
            seeds: one an image. An image depends on its own label, seed and settings only.
            noise: "per-image", or "official": drawn as the reference does, the batch as a whole.
            latents: (N, C, S, S) to start from, in place of noise.
            step_noise: (steps, N, C, S, S), draw k for the k-th step taken.
            backend: "auto", "lean", "eager" or "compile", or one that a package adds (dit_export:
                "onnxruntime", "tensorrt" or "trt", "triton://host:port"); it works or raises.
                While "compile" compiles, PYTHONSAFEPATH is set in this process's environment.
            precision: "fp32", "bf16" or "fp16", of the model; with "lean" also "int8" (on the CPU)
                and "fp8" (on CUDA), which quantise the blocks' matrix products. The sampler is
                always float32; the VAE decodes in float32 for "fp32" and "fp16", else in bfloat16.
            output: "pil", "np", "pt" or "latent"; None is "pil", or "latent" without a VAE.
            callback: called with a `Progress` after every step.

        Raises:
            ValueError: an argument out of its range; the message names it and what is allowed.
            BackendUnavailable: a backend that cannot run here.
        """
        numbers = resolve_labels(labels, self.config.num_classes, self.label_names)
        n = len(numbers)
        settings, scales = self._settings(
            n,
            guidance_scale,
            output=("latent" if self.vae is None else "pil") if output is None else output,
            sampler=sampler,
            steps=steps,
            spacing=spacing,
            eta=eta,
            guidance_channels=guidance_channels,
            guidance_interval=guidance_interval,
            noise=noise,
            precision=precision,
            backend=backend,
        )
        image_seeds = resolve_seeds(seed, seeds, n, settings.noise)
        shape = (self.config.in_channels, self.config.input_size, self.config.input_size)
        latents = given_noise("latents", latents, (n, *shape))
        step_noise = given_noise("step_noise", step_noise, (settings.steps, n, *shape))
        if callback is not None and not callable(callback):
            raise ValueError(f"callback {shown(callback)} is not callable")
        as_a_whole = settings.noise == "official"
        if as_a_whole and n > self.max_batch_size:
            raise ValueError(
                f"noise 'official' draws for the batch as a whole: {n} labels exceed "
                f"max_batch_size {self.max_batch_size}"
            )
        names = self._names(numbers, image_seeds)
        gradients = torch.is_grad_enabled()

        def run(first: int, count: int) -> Tensor:
            part = slice(first, first + count)

            def draws() -> NoiseSource:
                drawn: NoiseSource
                if as_a_whole:
                    guides = bool((scales != 1).any())
                    drawn = OfficialNoise(image_seeds[0], count, guides, shape, self.device)
                else:
                    drawn = PerImageNoise(image_seeds[part], shape, self.device)
                if latents is not None or step_noise is not None:
                    drawn = GivenNoise(
                        None if latents is None else latents[part],
                        None if step_noise is None else step_noise[:, part],
                        drawn,
                    )
                return drawn

            def report(step: int, z: Tensor) -> None:
                if callback is None:
                    return
                with torch.inference_mode(False), torch.set_grad_enabled(gradients):
                    own = z.clone()  # an ordinary tensor, and none that the next step reads
                    callback(Progress(step + 1, settings.steps, first, count, n, own))

            def sample(report: Callable[[int, Tensor], None]) -> Tensor:
                return self._sample(runner, numbers[part], scales[part], settings, draws(), report)

            z = sample(report)
            check_latents(z, sample, settings.steps, names[part])
            return z

        with neutral(self.device), limited_threads(self.threads):
            runner = self._backend(settings.backend, settings.precision)
            with torch.inference_mode():
                z = torch.cat(in_halves(run, n, self.max_batch_size, splittable=not as_a_whole))
                images = self._present(z, settings, names, runner)
            if isinstance(images, Tensor):
                images = images.clone()  # an ordinary tensor: it can be changed, and learnt from
        result = self._outcome(images, numbers, image_seeds, settings, scales, latents, step_noise)
        if settings.output == "pil":
            from dit_engine.metadata import sign

            sign(result)
        return result

    def planned(
        self,
        labels: list[int],
        seeds: list[int],
        *,
        guidance_scale: float | Sequence[float] | Tensor = 4.0,
        latents: Tensor | None = None,
        step_noise: Tensor | None = None,
        **options: Any,
    ) -> Generation:
        """What `generate` of class numbers, seeds and its other options would return, with None for
        images: nothing is computed."""
        settings, scales = self._settings(len(labels), guidance_scale, **options)
        return self._outcome(None, labels, seeds, settings, scales, latents, step_noise)

    def _settings(
        self, n: int, guidance_scale: float | Sequence[float] | Tensor, backend: str, **options: Any
    ) -> tuple[GenerateSettings, Tensor]:
        settings = GenerateSettings.of(
            backend=resolve_backend(backend),
            diffusion=self.config.diffusion,
            **options,
        )
        checked = settings.checked(self.config, has_vae=self.vae is not None)
        scales = parse_scales(guidance_scale, n).expand(n)
        if not self.config.has_null_class and (scales != 1).any():
            other = scales[scales != 1][0].item()
            raise ValueError(f"guidance_scale {other:g}: {NO_NULL_CLASS}; give guidance_scale 1")
        return checked, scales

    def _outcome(
        self,
        images: Any,
        labels: list[int],
        seeds: list[int],
        settings: GenerateSettings,
        scales: Tensor,  # (N,)
        latents: Tensor | None,
        step_noise: Tensor | None,
    ) -> Generation:
        record: dict[str, Any] = (
            self.sources
            | self.loading
            | {
                "numerics": self.config.numerics,
                "version": __version__,
            }
        )
        if diffusion := self.config.diffusion.record():  # what is not the published one's
            record["diffusion"] = diffusion
        record |= settings.record(scales) | _digests(latents=latents, step_noise=step_noise)
        drew = latents is None or (settings.uses_step_noise and step_noise is None)
        names = None if self.label_names is None else [self.label_names[i] for i in labels]
        return Generation(images, labels, seeds if drew else None, record, names)

    def _sample(
        self,
        backend: Backend,
        labels: list[int],
        scales: Tensor,
        settings: GenerateSettings,
        noise: NoiseSource,
        report: Callable[[int, Tensor], None],
    ) -> Tensor:
        """Noise to latents for one batch, (N, C, S, S) float32."""
        schedule = make_schedule(settings.steps, settings.spacing, self.config.diffusion)
        z = noise.start()  # (N, C, S, S)
        n = len(labels)
        guides = guided_steps(scales, len(schedule), settings.guidance_interval, schedule.sigmas)
        if guides.any():
            labels = labels + [self.config.null_class] * n
        conditions = (
            torch.tensor(labels, device=self.device),
            torch.tensor(schedule.timesteps, device=self.device),
        )
        table = step_coefficients(settings.sampler, schedule, self.config.learn_sigma, settings.eta)
        channels = settings.guidance_channels or self.config.in_channels
        fused = backend.fuse(*conditions, table, scales, channels)
        if fused is not None:
            clip = clipping(settings.sampler, schedule)
            return sample_fused(fused, z, uses_noise(table), guides, noise, report, clip)
        denoiser = backend.prepare(*conditions)
        denoise = guided(
            denoiser,
            n,
            scales.to(self.device),
            settings.guidance_channels,
            settings.guidance_interval,
            schedule.sigmas,
            self.config.in_channels,
        )
        options = {"eta": settings.eta} if settings.sampler == "ddim" else {}
        sampler = SAMPLERS[settings.sampler].function
        return sampler(denoise, z, schedule, noise, report, **options)

    def _present(
        self, z: Tensor, settings: GenerateSettings, names: Sequence[str], backend: Backend
    ) -> Any:
        """Latents z (N, C, S, S) in the form that was asked for. Raises `NotFinite`."""
        if settings.output == "latent":
            return z.cpu()
        assert self._decode is not None
        parts = []
        for first in range(0, len(z), self.max_batch_size):
            part = slice(first, first + self.max_batch_size)
            decoded = self._decode(z[part], settings.precision, backend.decoder)
            if settings.output == "pt":
                check_pixels(decoded, names[part])
                parts.append(decoded.cpu())
            else:
                parts.append(to_uint8(decoded, names[part]))
        if settings.output == "pt":
            return (torch.cat(parts).clamp(-1, 1) + 1) / 2
        pixels = np.concatenate(parts)
        return pixels if settings.output == "np" else to_pil(pixels)

    def _names(self, labels: list[int], seeds: list[int]) -> list[str]:
        """What messages call the images of a call."""
        classes = self.label_names
        return [
            f"image {i} (label {label}{f' {classes[label]!r}' if classes else ''}, seed {seed})"
            for i, (label, seed) in enumerate(zip(labels, seeds, strict=True))
        ]

    def _backend(self, name: str, precision: str) -> Backend:
        with self._lock:
            if (name, precision) not in self._backends:
                self._backends[name, precision] = create_backend(
                    name, self.model, precision, self.device
                )
            return self._backends[name, precision]


def _texts(name: str, value: Any) -> dict[str, str]:
    items = value.items() if isinstance(value, Mapping) else [(value, None)]
    if not all(isinstance(text, str) for item in items for text in item):
        raise ValueError(f"{name} {shown(value)} is not a dict of strings")
    return dict(value)


def _digests(**tensors: Tensor | None) -> dict[str, str]:
    """SHA-256 of given tensors as float32, so that a record tells which ones were used."""
    return {
        f"{name}_sha256": hashlib.sha256(tensor.float().cpu().numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
        if tensor is not None
    }
