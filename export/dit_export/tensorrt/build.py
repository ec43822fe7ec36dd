"""ONNX graphs to TensorRT engines; one way for the standard TensorRT and TensorRT for RTX."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dit_engine.io.files import file_hash
from dit_export.bundle import Bundle, Graph
from dit_export.onnx.files import check_metadata
from dit_export.targets import QUANTIZED, VAE_GRAPH
from dit_export.tensorrt.cuda_devices import make_current, require_device
from dit_export.tensorrt.engine_files import (
    REBUILD,
    EngineFile,
    EngineKey,
    EngineRefused,
    description_path,
    engine_path,
    read_description,
    write_engine,
)
from dit_export.tensorrt.flavour import Flavour
from dit_export.tensorrt.network import build_serialized
from dit_export.tensorrt.profiles import Profiles
from dit_export.tensorrt.reports import make_progress, process_logger

GIB = 2**30


@dataclass(frozen=True)
class BuildOptions:
    """What an engine is built with, beside its graph.

    Attributes:
        profiles: of every graph; those whose size is fixed ignore the profile's size.
        workspace_gib: bound of what layers may use beside weights and activations; None is none.
        capabilities: compute capabilities such as "8.9", for TensorRT for RTX; none is any.
        device: the GPU that the standard TensorRT builds on and for.
        rebuild: build anew what is there, whatever its state.
        quiet: no progress bar.
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

    An engine that is there with the same key is verified and kept.

    Raises:
        ValueError: a graph that is not there, or that TensorRT refuses (with the node's name), or
            an export whose graphs TensorRT would refuse, having been written for another runtime.
        EngineRefused: an engine that is there, but not as it was written; see ``rebuild``.
        BackendUnavailable: the standard TensorRT without a GPU.
    """
    if bundle.target != "tensorrt" and bundle.dtype in ("fp32", *QUANTIZED):
        raise ValueError(
            f"{bundle.path}: {bundle.dtype} graphs for {bundle.target}, which TensorRT does not "
            "take; export them with --target tensorrt"
        )
    names = tuple(bundle.graphs) if graphs is None else graphs
    files = {name: bundle.file(name) for name in names}
    for name in names:
        check_metadata(bundle, name)
    engines = {}
    for name, path in files.items():
        began = time.perf_counter()
        weights = (bundle.vae_checkpoint if name == VAE_GRAPH else bundle.checkpoint) or ""
        key = engine_key(graph_hash(bundle, name), bundle.graphs[name], flavour, options)
        graph, model = bundle.graphs[name], bundle.config.to_dict()
        engine = None
        if not options.rebuild:
            engine = existing(directory, graph, weights, model, key)
        if engine is None:
            engine = build_engine(path, graph, weights, model, key, directory, flavour, options)
            how = f"built in {time.perf_counter() - began:.1f} s"
        else:
            how = "is there already"
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
    free = any(isinstance(n, str) for tensor in graph.inputs for n in tensor.shape[1:])
    profiles = options.profiles
    if not free:
        profiles = tuple(dict.fromkeys(replace(profile, size=None) for profile in profiles))
    return EngineKey(
        graph=graph_sha256,
        flavour=flavour.name,
        version=flavour.version,
        target=_target(flavour, options),
        profiles=profiles,
        workspace_bytes=0 if options.workspace_gib is None else int(options.workspace_gib * GIB),
    )


def _target(flavour: Flavour, options: BuildOptions) -> str:
    if not flavour.builds_without_gpu:
        if options.capabilities:
            raise ValueError(
                f"capability {options.capabilities[0]}: the standard TensorRT builds for the GPU "
                "that is here; only TensorRT for RTX builds for others"
            )
        return str(require_device(options.device, "building with the standard TensorRT"))
    return " ".join(options.capabilities) or "any"


def existing(
    directory: Path, graph: Graph, checkpoint: str, model: dict[str, Any], key: EngineKey
) -> EngineFile | None:
    """The engine with that key, checked; None if it is missing, unfinished or for another config.

    Raises `EngineRefused` if it has changed since it was built, or describes another engine.
    """
    path = engine_path(directory, graph.name, key)
    if not description_path(path).exists():
        return None
    engine = read_description(path)
    claimed = (engine.key, engine.graph, engine.dtype, engine.checkpoint)
    if claimed != (key, graph.name, graph.dtype, checkpoint):
        raise EngineRefused(f"{engine.description}: describes another engine{REBUILD}")
    if engine.model != model and graph.name != VAE_GRAPH:  # several models have the same VAE
        return None
    if not path.exists() or path.stat().st_size != engine.bytes or file_hash(path) != engine.sha256:
        engine.read()  # says what is wrong
    return engine


def build_engine(
    onnx: Path,
    graph: Graph,
    checkpoint: str,
    model: dict[str, Any],
    key: EngineKey,
    directory: Path,
    flavour: Flavour,
    options: BuildOptions,
) -> EngineFile:
    """Build one engine and write it with its description. Raises as `build_bundle` does."""
    trt = flavour.load()
    if not flavour.builds_without_gpu:
        make_current(options.device)
    logger = process_logger(trt)
    logger.errors.clear()
    progress = make_progress(trt, graph.name, options.quiet)
    with ExitStack() as stack:
        stack.callback(gc.collect)
        stack.callback(progress.close)
        data, inputs, outputs = build_serialized(
            trt, onnx, key, directory, flavour, logger, progress
        )
    path = engine_path(directory, graph.name, key)
    made = EngineFile(path, graph.name, checkpoint, graph.dtype, key, inputs, outputs, "", 0, model)
    return write_engine(made, data)
