"""The tensorrt backend: conditioner and denoiser as engines, run on torch tensors.

The graphs are exported and the engines built at first use, into ``DIT_ENGINE_CACHE`` (or
``~/.cache/dit-engine``), unless the backend's name says where engines are:
``tensorrt:///path/to/engines``. These variables choose among the ways to do so:

``DIT_TENSORRT_FLAVOUR``    auto, tensorrt or rtx
``DIT_TENSORRT_BATCH``      the profile's smallest, best and largest batch, "1,8,64"; guidance
                            doubles an image's rows; several profiles are separated by ";"
``DIT_TENSORRT_STREAMS``    how many threads run at once
``DIT_TENSORRT_REBUILD``    1: build anew what is there; not for engines that were named
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dit_engine.backends import Backend, Denoiser
from dit_engine.backends.lean.conditioning import ModulationTable
from dit_engine.errors import BackendUnavailable
from dit_engine.model import DiT
from dit_export.onnx.graphs import modulation_width
from dit_export.source import weights_hash
from dit_export.tensorrt.cuda_devices import CudaDevice, require_device
from dit_export.tensorrt.engine_files import EngineFile, EngineRefused, find_engines
from dit_export.tensorrt.flavour import FLAVOURS, Flavour, choose_flavour
from dit_export.tensorrt.memory import TorchMemory
from dit_export.tensorrt.profiles import Profiles, parse_profiles
from dit_export.tensorrt.session import LoadedEngine, SessionPool

GRAPHS = ("conditioner", "denoiser")
DEFAULT_BATCH = "1,8,64"


@dataclass(frozen=True)
class Settings:
    """What the environment says; see the module."""

    flavour: str
    profiles: Profiles
    streams: int
    rebuild: bool

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Settings:
        """Raises ValueError, which names the variable."""
        batch = environment.get("DIT_TENSORRT_BATCH", DEFAULT_BATCH)
        try:
            profiles = parse_profiles(batch.split(";"))
        except ValueError as error:
            raise ValueError(f"DIT_TENSORRT_BATCH: {error}") from None
        streams = environment.get("DIT_TENSORRT_STREAMS", "1")
        if not streams.isdecimal() or int(streams) < 1:
            raise ValueError(f"DIT_TENSORRT_STREAMS {streams!r} is not a positive integer")
        rebuild = environment.get("DIT_TENSORRT_REBUILD", "0")
        if rebuild not in ("0", "1"):
            raise ValueError(f"DIT_TENSORRT_REBUILD {rebuild!r}: 0 or 1")
        flavour = environment.get("DIT_TENSORRT_FLAVOUR", "auto")
        if flavour not in FLAVOURS:
            raise ValueError(
                f"DIT_TENSORRT_FLAVOUR {flavour!r}: choose one of {', '.join(FLAVOURS)}"
            )
        return cls(flavour, profiles, int(streams), rebuild == "1")


class TensorRTBackend(Backend):
    """Raises `BackendUnavailable` where there is no GPU, no driver or no TensorRT."""

    def __init__(
        self, model: DiT, precision: str, device: torch.device, address: str | None = None
    ) -> None:
        settings = Settings.read(os.environ)
        if settings.rebuild and address is not None:
            raise ValueError(
                f"DIT_TENSORRT_REBUILD=1 is for engines in the cache, and those of {address} were "
                "named: build them again with dit-export tensorrt --rebuild"
            )
        index = device.index or 0
        gpu = require_device(index, "backend 'tensorrt'")
        try:
            flavour = choose_flavour(settings.flavour)
        except ImportError as error:
            raise BackendUnavailable(f"backend 'tensorrt': {error}") from None
        if device.type != "cuda":
            raise BackendUnavailable(
                f"backend 'tensorrt' runs on a CUDA device of torch, and this is {str(device)!r}"
            )
        if address is None:
            engines = cached_engines(model, precision, index, flavour, settings)
        else:
            engines = given_engines(model, precision, Path(address), flavour, gpu)
        cuda = torch.device("cuda", index)
        with torch.cuda.device(cuda):  # engines are loaded onto the current one
            pools = {
                name: SessionPool(
                    LoadedEngine(file, flavour, gpu), lambda: TorchMemory(cuda), settings.streams
                )
                for name, file in engines.items()
            }
        self._pair = EnginePair(model, pools["conditioner"], pools["denoiser"], device)

    def prepare(self, labels: Tensor, timesteps: Tensor) -> Denoiser:
        return self._pair.prepare(labels, timesteps)


class EnginePair:
    """The transformer as two engines, of which the conditioner runs before the sampling loop."""

    def __init__(
        self, model: DiT, conditioner: SessionPool, denoiser: SessionPool, device: torch.device
    ) -> None:
        self.denoiser = denoiser
        self.conditioning = EngineConditioning(model, conditioner, device)

    def prepare(self, labels: Tensor, timesteps: Tensor) -> Denoiser:
        conditioning, config = self.conditioning, self.conditioning.config
        table = ModulationTable(conditioning, labels, timesteps, by_label=False)

        def denoise(x: Tensor, step: int) -> Tensor:
            if len(x) == 0:  # no profile holds it
                return x.new_empty(0, config.out_channels, *x.shape[2:])
            inputs = {"x": x.float(), "modulations": table.step(step, len(x))}
            return self.denoiser.run(inputs)["output"].to(x.dtype)

        return denoise


class EngineConditioning:
    """`dit_engine.backends.lean.conditioning.Conditions` by the conditioner's engine; rows are
    float32."""

    def __init__(self, model: DiT, pool: SessionPool, device: torch.device) -> None:
        self.config, self.pool, self.device = model.config, pool, device
        self.dtype = torch.float32
        self.width = modulation_width(model.config)

    def embed(self, timesteps: Tensor) -> Tensor:
        """The time steps as they are: the engine embeds them."""
        return timesteps

    def rows(self, t: Tensor, labels: Tensor, by_label: bool) -> Tensor:
        """Modulations (K, L, width) of time steps t (K,) × labels (L,)."""
        del by_label
        k, n = len(t), len(labels)
        t = t.to(self.device, torch.int64).repeat_interleave(n)  # (K·L,)
        y = labels.to(self.device, torch.int64).repeat(k)
        profiles = self.pool.engine.file.key.profiles
        largest = max(profile.batch.largest for profile in profiles)
        sizes = [(profile.batch.smallest, profile.batch.largest) for profile in profiles]
        parts = []
        for t_part, y_part in zip(t.split(largest), y.split(largest), strict=True):
            rows = len(t_part)
            # Rows are independent: the last one is repeated until a profile holds the batch.
            if (missing := padding(rows, sizes)) > 0:
                t_part = torch.cat([t_part, t_part[-1:].expand(missing)])
                y_part = torch.cat([y_part, y_part[-1:].expand(missing)])
            made = self.pool.run({"t": t_part, "y": y_part})["modulations"]
            parts.append(made[:rows])
        return torch.cat(parts).view(k, n, self.width)


def padding(rows: int, sizes: Sequence[tuple[int, int]]) -> int:
    """How many rows to add until a profile of (smallest, largest) batch holds them; ``rows`` is at
    most the largest of all."""
    return min(max(low - rows, 0) for low, high in sizes if rows <= high)


def cached_engines(
    model: DiT, precision: str, device: int, flavour: Flavour, settings: Settings
) -> dict[str, EngineFile]:
    """The engines of this model in the cache, exported and built if they are not there.

    Raises as `cached_export` and `build_bundle` do.
    """
    from dit_engine.io.caches import private_cache
    from dit_export.cache import cached_export
    from dit_export.onnx.export import ExportOptions
    from dit_export.tensorrt.build import BuildOptions, build_bundle

    bundle = cached_export(model, ExportOptions(precision, "tensorrt", graphs=GRAPHS))
    options = BuildOptions(settings.profiles, device=device, rebuild=settings.rebuild)
    return build_bundle(bundle, private_cache("tensorrt"), flavour, options, GRAPHS)


def _runs(file: EngineFile, here: tuple[str, str], gpu: CudaDevice) -> bool:
    try:
        file.check(*here, gpu)
    except EngineRefused:
        return False
    return True


def given_engines(
    model: DiT, precision: str, directory: Path, flavour: Flavour, gpu: CudaDevice
) -> dict[str, EngineFile]:
    """The newest engines for ``model`` in a directory.

    Raises `EngineRefused` where there is none of its weights, config and precision, or none that
    this TensorRT and this device can run.
    """
    checkpoint, here = weights_hash(model), (flavour.name, flavour.version)
    engines = {}
    for graph in GRAPHS:
        found = find_engines(directory, graph, checkpoint, precision, model.config.to_dict())
        fitting = [f for f in found if _runs(f, here, gpu)]
        engines[graph] = (fitting or found)[0]
        engines[graph].check(flavour.name, flavour.version, gpu)
    return engines
