"""From an ONNX file to a serialised TensorRT engine: parser, profiles, builder.

Networks are strongly typed: precision is what the graph says, in its casts and QDQ pairs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dit_engine.io.files import atomic_path
from dit_export.tensorrt.engine_files import EngineKey
from dit_export.tensorrt.flavour import Flavour
from dit_export.tensorrt.reports import last_error, parser_errors, process_logger

TIMING_CACHE = "timing.cache"

Shapes = dict[str, tuple[int, ...]]
"""By tensor name; -1 is free."""


def build_serialized(
    trt: Any,
    onnx: Path,
    key: EngineKey,
    directory: Path,
    flavour: Flavour,
    logger: Any,
    progress: Any,
) -> tuple[Any, Shapes, Shapes]:
    """(the engine as a buffer, its inputs, its outputs) of an ONNX file.

    Raises ValueError, one line, for a graph or a profile that TensorRT refuses.
    """
    builder = trt.Builder(logger)
    network, parser = parse(trt, builder, logger, onnx)
    config = builder.create_builder_config()
    try:
        config.progress_monitor = progress
        configure(trt, builder, network, config, key, logger)
        if flavour.has_timing_cache:
            attach_timing_cache(config, directory / TIMING_CACHE)
        data = builder.build_serialized_network(network, config)
        if progress.interrupted:
            raise KeyboardInterrupt
        if data is None:
            raise ValueError(f"{onnx}: {flavour} builds no engine: {last_error(logger)}")
        if flavour.has_timing_cache:
            save_timing_cache(config, directory / TIMING_CACHE)
        inputs = {tensor.name: tuple(tensor.shape) for tensor in _inputs(network)}
        outputs = [network.get_output(i) for i in range(network.num_outputs)]
        return data, inputs, {tensor.name: tuple(tensor.shape) for tensor in outputs}
    finally:
        # The parser owns the weights that the network refers to: it goes last but for the network.
        del config, parser
        del network


def configure(
    trt: Any, builder: Any, network: Any, config: Any, key: EngineKey, logger: Any
) -> None:
    """Limits, devices and profiles; raises ValueError for those that TensorRT refuses."""
    if key.workspace_bytes:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, key.workspace_bytes)
    if key.flavour == "rtx" and key.target != "any":
        _set_capabilities(trt, config, key.target.split())
    for profile in key.profiles:
        bounds = builder.create_optimization_profile()
        for tensor in _inputs(network):
            bounds.set_shape(tensor.name, *profile.shapes(tuple(tensor.shape)))
        if config.add_optimization_profile(bounds) < 0:
            raise ValueError(f"TensorRT refuses the profile {profile}: {last_error(logger)}")


def _inputs(network: Any) -> list[Any]:
    return [network.get_input(i) for i in range(network.num_inputs)]


def parse(trt: Any, builder: Any, logger: Any, onnx: Path) -> tuple[Any, Any]:
    """(network, parser) of an ONNX file; the parser must not outlive the network.

    Raises ValueError, one line with the nodes' names, for a graph that TensorRT refuses.
    """
    # Where the flag is unknown, every network is strongly typed.
    typed = trt.NetworkDefinitionCreationFlag.__members__.get("STRONGLY_TYPED")
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        reasons = parser_errors(parser) or [last_error(logger)]
        del parser, network
        raise ValueError(f"{onnx}: TensorRT refuses it: {'; '.join(reasons)}")
    return network, parser


def check_supported(flavour: Flavour, onnx: Path) -> list[str]:
    """Why TensorRT's parser does not support a graph; nothing where it does."""
    trt = flavour.load()
    logger = process_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    supported = parser.supports_model_v2(onnx.read_bytes(), str(onnx))
    reasons = [] if supported else parser_errors(parser) or [last_error(logger)]
    del parser, network
    return reasons


def _set_capabilities(trt: Any, config: Any, capabilities: list[str]) -> None:
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        config.set_compute_capability(_capability(trt, capability), index)


def _capability(trt: Any, capability: str) -> Any:
    known = {
        f"{name[2:-1]}.{name[-1]}": value
        for name, value in trt.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    if capability not in known:
        raise ValueError(f"capability {capability!r}: choose from {', '.join(known)}")
    return known[capability]


def attach_timing_cache(config: Any, path: Path) -> None:
    """Timings of earlier builds, for the next one; a damaged file counts as none.

    Those of another device or version are left out by TensorRT.
    """
    for earlier in (path.read_bytes() if path.is_file() else b"", b""):
        cache = config.create_timing_cache(earlier)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def save_timing_cache(config: Any, path: Path) -> None:
    """What a build has timed, for the next one; no file where there is nothing."""
    cache = config.get_timing_cache()
    content = None if cache is None else cache.serialize()
    if content is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        partial.write_bytes(content)
