"""ONNX graphs to TensorRT engines, the same way for the standard TensorRT and TensorRT for RTX."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dit_export.bundle import Bundle, Graph
from dit_export.onnx.files import check_metadata
from dit_export.targets import QUANTIZED, VAE_GRAPH
from dit_export.tensorrt.engine_files import (
    EngineFile,
    EngineKey,
    EngineRefused,
    engine_path,
    read_description,
    write_engine,
)
from dit_export.tensorrt.installed import Flavour, require_device
from dit_export.tensorrt.network import build_serialized
from dit_export.tensorrt.profiles import Profiles


@dataclass(frozen=True)
class BuildOptions:
    """What an engine is built with, beside its graph; see ``dit-export tensorrt --help``.

    Graphs whose size is fixed ignore the profiles' size. Without capabilities (such as "8.9"),
    TensorRT for RTX builds for any device.
    """

    profiles: Profiles
    workspace_gib: float | None = None
    capabilities: tuple[str, ...] = ()
    device: int = 0
    rebuild: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.workspace_gib is not None and not 0 < self.workspace_gib < 2**20:
            raise ValueError(f"workspace {self.workspace_gib} GiB: a number above 0 is needed")


def build_bundle(
    bundle: Bundle,
    directory: Path,
    flavour: Flavour,
    options: BuildOptions,
    graphs: tuple[str, ...] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, EngineFile]:
    """Engines in ``directory`` for some of a bundle's graphs (all, unless given), by name.

    An engine that is there with the same key is verified and kept, if it has not changed.

    Raises:
        ValueError: a graph that is not there, or that TensorRT refuses (with the node's name), or
            an export for another runtime with graphs that TensorRT would refuse.
        BackendUnavailable: the standard TensorRT without a GPU.
    """
    if bundle.target != "tensorrt" and bundle.dtype in ("fp32", *QUANTIZED):
        raise ValueError(
            f"{bundle.path}: {bundle.dtype} graphs for {bundle.target}, which TensorRT does not "
            "take; export them with --target tensorrt"
        )
    names = tuple(bundle.graphs) if graphs is None else graphs
    for name in names:
        check_metadata(bundle, name)
    engines = {}
    for name in names:
        began, graph = time.perf_counter(), bundle.graphs[name]
        key = engine_key(graph_hash(bundle, name), graph, flavour, options)
        weights = (bundle.vae_checkpoint if name == VAE_GRAPH else bundle.checkpoint) or ""
        path, model = engine_path(directory, name, key), bundle.config.to_dict()
        wanted = EngineFile(path, name, weights, graph.dtype, key, model=model)
        engine, how = None if options.rebuild else existing(wanted), "is there already"
        if engine is None:
            with nullcontext() if flavour.builds_without_gpu else torch.cuda.device(options.device):
                data = build_serialized(bundle.file(name), wanted, flavour, options.quiet)
            gc.collect()
            engine = write_engine(wanted, data)
            how = f"built in {time.perf_counter() - began:.1f} s"
        report(f"{name}: {engine.bytes / 2**20:.1f} MiB, {how} → {engine.path}")
        engines[name] = engine
    return engines


def graph_hash(bundle: Bundle, name: str) -> str:
    """SHA-256 over a graph's own file and the files of weights beside it."""
    own = bundle.graph(name).file
    digest = hashlib.sha256()
    for file, listed in sorted(bundle.manifest["files"].items()):
        if file == own or file.startswith(f"{own}."):
            digest.update(f"{listed['sha256']}\n".encode())
    return digest.hexdigest()


def engine_key(
    graph_sha256: str, graph: Graph, flavour: Flavour, options: BuildOptions
) -> EngineKey:
    profiles = options.profiles
    if not any(isinstance(n, str) for tensor in graph.inputs for n in tensor.shape[1:]):
        profiles = tuple(dict.fromkeys(replace(profile, size=None) for profile in profiles))
    if flavour.builds_without_gpu:
        target = " ".join(options.capabilities) or "any"
    elif options.capabilities:
        raise ValueError(
            f"capability {options.capabilities[0]}: the standard TensorRT builds for the GPU "
            "that is here; only TensorRT for RTX builds for others"
        )
    else:
        target = str(require_device(options.device, "building with the standard TensorRT"))
    workspace = 0 if options.workspace_gib is None else int(options.workspace_gib * 2**30)
    return EngineKey(graph_sha256, flavour.name, flavour.version, target, profiles, workspace)


def existing(wanted: EngineFile) -> EngineFile | None:
    """The engine that is there, checked; None if it is missing, unfinished, damaged or another."""
    try:
        engine = read_description(wanted.path)
        same = ("key", "graph", "dtype", "checkpoint")
        if any(getattr(engine, name) != getattr(wanted, name) for name in same):
            return None
        if engine.model != wanted.model and engine.graph != VAE_GRAPH:  # models may share a VAE
            return None
        engine.read()
        return engine
    except EngineRefused:
        return None
