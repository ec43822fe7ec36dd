"""ONNX graphs to TensorRT engines, the same way for the standard TensorRT and TensorRT for RTX.

Networks are strongly typed: the casts and QDQ pairs of the graph decide the precision.
"""

from __future__ import annotations

import gc
import hashlib
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dit_engine.io.printable import one_line
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
from dit_export.tensorrt.installed import Flavour, last_error, process_logger, require_device
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

    An existing engine with the same key is verified, and kept if it has not changed.

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
    """The engine on disk, checked; None if it is missing, unfinished, damaged or another one."""
    try:
        engine = read_description(wanted.path)
        engine.read()
    except EngineRefused:
        return None
    model = engine.model if engine.graph == VAE_GRAPH else wanted.model  # models may share a VAE
    same = replace(wanted, sha256=engine.sha256, bytes=engine.bytes, model=model)
    return engine if engine == same else None


def build_serialized(onnx: Path, wanted: EngineFile, flavour: Flavour, quiet: bool) -> Any:
    """The engine, as a buffer, of an ONNX file.

    Raises ValueError, one line, for a graph or a profile that TensorRT refuses.
    """
    trt = flavour.load()
    logger = process_logger(trt)
    logger.errors.clear()
    builder = trt.Builder(logger)
    network, parser = parse(trt, builder, logger, onnx)
    config = builder.create_builder_config()
    progress = make_progress(trt, wanted.graph, quiet)
    try:
        config.progress_monitor = progress
        if wanted.key.workspace_bytes:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, wanted.key.workspace_bytes)
        if flavour.builds_without_gpu:
            set_capabilities(trt, config, wanted.key.target)
        for profile in wanted.key.profiles:
            bounds = builder.create_optimization_profile()
            for tensor in map(network.get_input, range(network.num_inputs)):
                bounds.set_shape(tensor.name, *profile.shapes(tuple(tensor.shape)))
            if config.add_optimization_profile(bounds) < 0:
                raise ValueError(f"TensorRT refuses the profile {profile}: {last_error(logger)}")
        data = builder.build_serialized_network(network, config)
        if progress.interrupted:
            raise KeyboardInterrupt
        if data is None:
            raise ValueError(f"{onnx}: {flavour} builds no engine: {last_error(logger)}")
        return data
    finally:
        progress.bar.close()
        # The parser owns the weights that the network refers to, so they go in this order.
        del config, parser
        del network


def parse(trt: Any, builder: Any, logger: Any, onnx: Path) -> tuple[Any, Any]:
    """(network, parser) of an ONNX file; the parser must not outlive the network.

    Raises ValueError, one line with the nodes' names, for a graph that TensorRT refuses.
    """
    # In versions without this flag, every network is strongly typed.
    typed = trt.NetworkDefinitionCreationFlag.__members__.get("STRONGLY_TYPED")
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = [
            f"node {e.node_name() or e.node()} ({e.node_operator()}): {e.desc()}" for e in errors
        ]
        del errors, parser, network
        raise ValueError(
            f"{onnx}: TensorRT refuses it: {one_line('; '.join(reasons) or last_error(logger))}"
        )
    return network, parser


def set_capabilities(trt: Any, config: Any, target: str) -> None:
    """Set ``target``, "any" or compute capabilities such as "8.9 12.0"; else ValueError."""
    if target == "any":
        return
    known = {
        f"{name[2:-1]}.{name[-1]}": value
        for name, value in trt.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    config.num_compute_capabilities = len(target.split())
    for index, capability in enumerate(target.split()):
        if capability not in known:
            raise ValueError(f"capability {capability!r}: choose from {', '.join(known)}")
        config.set_compute_capability(known[capability], index)


def make_progress(trt: Any, title: str, quiet: bool) -> Any:
    """An IProgressMonitor that shows the phase of a build and its time. Ctrl-C sets its
    ``interrupted`` and ends the build."""
    from dit_engine.console.bars import Bar

    class Progress(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            shown = "{desc}: {elapsed}{postfix}"
            self.bar = Bar(
                desc=title, file=sys.stderr, disable=quiet, leave=False, bar_format=shown
            )
            self.interrupted = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.bar.set_postfix_str(phase_name, refresh=False)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                self.bar.update()
            except KeyboardInterrupt:  # an exception cannot pass through TensorRT; False stops it
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Progress()
