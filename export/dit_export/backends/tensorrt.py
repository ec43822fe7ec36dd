"""The tensorrt backend: conditioner and denoiser as engines, run on torch tensors.

The first use exports the graphs and builds the engines into ``DIT_ENGINE_CACHE`` (or
``~/.cache/dit-engine``), unless the backend's name says where engines are:
``tensorrt:///path/to/engines``. Two environment variables are settings:

``DIT_TENSORRT_FLAVOUR``    auto, tensorrt or rtx
``DIT_TENSORRT_BATCH``      the profile's smallest, best and largest batch, "1,8,64"; guidance
                            doubles an image's rows; several profiles are separated by ";"
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from dit_engine.arguments import choice
from dit_engine.backends import Backend, Denoiser
from dit_engine.config import ModelConfig
from dit_engine.errors import BackendUnavailable
from dit_engine.model import DiT
from dit_export.backends.pair import GRAPHS, GraphPair
from dit_export.source import weights_hash
from dit_export.tensorrt.engine_files import EngineFile, find_engines
from dit_export.tensorrt.installed import (
    FLAVOURS,
    CudaDevice,
    Flavour,
    choose_flavour,
    require_device,
)
from dit_export.tensorrt.profiles import Profiles, parse_profiles
from dit_export.tensorrt.session import Session, TorchMemory


class TensorRTBackend(Backend):
    """Raises `BackendUnavailable` if there is no GPU, and ImportError if there is no TensorRT."""

    def __init__(
        self, model: DiT, precision: str, device: torch.device, address: str | None = None
    ) -> None:
        try:
            profiles = parse_profiles(os.environ.get("DIT_TENSORRT_BATCH", "1,8,64").split(";"))
        except ValueError as error:
            raise ValueError(f"DIT_TENSORRT_BATCH: {error}") from None
        name = os.environ.get("DIT_TENSORRT_FLAVOUR", "auto")
        choice("DIT_TENSORRT_FLAVOUR", name, FLAVOURS)
        if device.type != "cuda":
            raise BackendUnavailable(
                f"backend 'tensorrt' runs on a CUDA device of torch, and this is {str(device)!r}"
            )
        cuda = torch.device("cuda", device.index or 0)
        gpu = require_device(cuda.index, "backend 'tensorrt'")
        flavour = choose_flavour(name)
        if address is None:
            engines = cached_engines(model, precision, cuda.index, flavour, profiles)
        else:
            engines = given_engines(model, precision, Path(address), flavour, gpu)
        with torch.cuda.device(cuda):  # engines are loaded onto the current one
            conditioner, denoiser = (
                Session(engines[graph], flavour, gpu, TorchMemory(cuda)) for graph in GRAPHS
            )
        self._pair = engine_pair(model.config, conditioner, denoiser, device)

    def prepare(self, labels: Tensor, timesteps: Tensor) -> Denoiser:
        return self._pair.prepare(labels, timesteps)


def engine_pair(
    config: ModelConfig, conditioner: Session, denoiser: Session, device: torch.device
) -> GraphPair:
    largest = max(profile.batch.largest for profile in conditioner.file.key.profiles)

    def condition(t: Tensor, y: Tensor) -> Tensor:
        parts = []
        for some_t, some_y in zip(t.split(largest), y.split(largest), strict=True):
            # Rows are independent: the last one is repeated until the largest batch is full.
            index = torch.arange(largest, device=device).clamp(max=len(some_t) - 1)
            made = conditioner.run({"t": some_t[index], "y": some_y[index]})["modulations"]
            parts.append(made[: len(some_t)])
        return torch.cat(parts)

    def denoise(x: Tensor, modulations: Tensor) -> Tensor:
        return denoiser.run({"x": x, "modulations": modulations})["output"]

    return GraphPair(config, device, condition, denoise)


def cached_engines(
    model: DiT, precision: str, device: int, flavour: Flavour, profiles: Profiles
) -> dict[str, EngineFile]:
    """The engines of this model in the cache, exported and built if they are not there.

    Raises as `cached_export` and `build_bundle` do.
    """
    from dit_engine.io.caches import private_cache
    from dit_export.cache import cached_export
    from dit_export.onnx.export import ExportOptions
    from dit_export.tensorrt.build import BuildOptions, build_bundle

    bundle = cached_export(model, ExportOptions(precision, "tensorrt", graphs=GRAPHS))
    options = BuildOptions(profiles, device=device)
    return build_bundle(bundle, private_cache("tensorrt"), flavour, options, GRAPHS)


def given_engines(
    model: DiT, precision: str, directory: Path, flavour: Flavour, gpu: CudaDevice
) -> dict[str, EngineFile]:
    """The newest engines for ``model`` in a directory that run here.

    Raises `EngineRefused` if there is none of its weights, config and precision, or none that this
    TensorRT and this device can run.
    """
    config = model.config.to_dict()
    facts = {"checkpoint": weights_hash(model), "dtype": precision, "model": config}

    def check(engine: EngineFile) -> None:
        engine.check(flavour.name, flavour.version, gpu)

    return {graph: find_engines(directory, graph, check, **facts)[0] for graph in GRAPHS}
