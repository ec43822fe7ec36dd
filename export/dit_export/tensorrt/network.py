"""From an ONNX file to a serialised TensorRT engine: parser, profiles, builder, log and progress.

Networks are strongly typed: the casts and QDQ pairs of the graph decide the precision.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections import deque
from pathlib import Path
from typing import Any

from dit_engine.io.printable import one_line
from dit_export.tensorrt.engine_files import EngineFile
from dit_export.tensorrt.installed import Flavour

_LOG = logging.getLogger(__name__)


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
    """target: "any" or compute capabilities, such as "8.9 12.0". Raises ValueError for others."""
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


@functools.cache
def process_logger(trt: Any) -> Any:
    """An ILogger that keeps the last errors for the exception that follows, and logs the rest.

    There is one per process, because TensorRT keeps a process's first logger for itself.
    """

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=16)

        def log(self, severity: Any, msg: str) -> None:
            levels = trt.ILogger.Severity
            if severity in (levels.ERROR, levels.INTERNAL_ERROR):
                self.errors.append(msg)
            else:
                _LOG.log(logging.INFO if severity == levels.WARNING else logging.DEBUG, msg)

    return Logger()


def last_error(logger: Any) -> str:
    return one_line(logger.errors[-1]) if logger.errors else "it does not say why"


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
