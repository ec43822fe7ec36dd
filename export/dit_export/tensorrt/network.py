"""From an ONNX file to a serialised TensorRT engine: parser, profiles, builder, log and progress.

Networks are strongly typed: the casts and QDQ pairs of the graph decide the precision.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Any

from dit_engine.io.files import atomic_path
from dit_export.tensorrt.engine_files import EngineFile, EngineKey
from dit_export.tensorrt.installed import Flavour

TIMING_CACHE = "timing.cache"
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} {postfix}"
_LOG = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]
"""By tensor name; -1 is free."""


def build_serialized(
    onnx: Path, wanted: EngineFile, flavour: Flavour, quiet: bool
) -> tuple[Any, Shapes, Shapes]:
    """(the engine as a buffer, its inputs, its outputs) of an ONNX file.

    Raises ValueError, one line, for a graph or a profile that TensorRT refuses.
    """
    trt = flavour.load()
    logger = process_logger(trt)
    logger.errors.clear()
    builder = trt.Builder(logger)
    timings = wanted.path.with_name(TIMING_CACHE)
    network, parser = parse(trt, builder, logger, onnx)
    config = builder.create_builder_config()
    progress = make_progress(trt, wanted.graph, quiet)
    try:
        config.progress_monitor = progress
        configure(trt, builder, network, config, wanted.key, logger)
        if not flavour.builds_without_gpu:
            attach_timing_cache(config, timings)
        data = builder.build_serialized_network(network, config)
        if progress.interrupted:
            raise KeyboardInterrupt
        if data is None:
            raise ValueError(f"{onnx}: {flavour} builds no engine: {last_error(logger)}")
        if not flavour.builds_without_gpu:
            save_timing_cache(config, timings)
        outputs = [network.get_output(i) for i in range(network.num_outputs)]
        inputs, outputs = (
            {tensor.name: tuple(tensor.shape) for tensor in tensors}
            for tensors in (_inputs(network), outputs)
        )
        return data, inputs, outputs
    finally:
        progress.close()
        # The parser owns the weights that the network refers to, so they go in this order.
        del config, parser
        del network


def configure(
    trt: Any, builder: Any, network: Any, config: Any, key: EngineKey, logger: Any
) -> None:
    """Set limits, devices and profiles; raises ValueError for those that TensorRT refuses."""
    if key.workspace_bytes:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, key.workspace_bytes)
    if key.flavour == "rtx" and key.target != "any":
        known = {
            f"{name[2:-1]}.{name[-1]}": value
            for name, value in trt.ComputeCapability.__members__.items()
            if name.startswith("SM")
        }
        config.num_compute_capabilities = len(key.target.split())
        for index, capability in enumerate(key.target.split()):
            if capability not in known:
                raise ValueError(f"capability {capability!r}: choose from {', '.join(known)}")
            config.set_compute_capability(known[capability], index)
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
    # In versions without this flag, every network is strongly typed.
    typed = trt.NetworkDefinitionCreationFlag.__members__.get("STRONGLY_TYPED")
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        reasons = parser_errors(parser) or [last_error(logger)]
        del parser, network
        raise ValueError(f"{onnx}: TensorRT refuses it: {'; '.join(reasons)}")
    return network, parser


def attach_timing_cache(config: Any, path: Path) -> None:
    """Give a build the timings of earlier ones; a damaged file counts as none.

    TensorRT leaves out those of another device or version.
    """
    for earlier in (path.read_bytes() if path.is_file() else b"", b""):
        cache = config.create_timing_cache(earlier)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def save_timing_cache(config: Any, path: Path) -> None:
    """Keep what a build has timed for the next one; no file is written if there is nothing."""
    cache = config.get_timing_cache()
    content = None if cache is None else cache.serialize()
    if content is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        partial.write_bytes(content)


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
    """The newest of a logger's errors, in one line."""
    return " ".join(logger.errors[-1].split()) if logger.errors else "it does not say why"


def parser_errors(parser: Any) -> list[str]:
    """One line per error: which node, of which operator, and what is wrong with it."""
    lines = []
    for error in map(parser.get_error, range(parser.num_errors)):
        where = ""
        if error.node_operator():
            where = f"node {error.node_name() or error.node()} ({error.node_operator()}): "
        lines.append(" ".join(f"{where}{error.desc()}".split()))
    return lines


def make_progress(trt: Any, title: str, quiet: bool) -> Any:
    """An IProgressMonitor that shows the outermost phase as a bar, with the innermost one's name.

    TensorRT calls it from several threads. It has ``close`` and, for a build that was interrupted,
    ``interrupted``.
    """
    from dit_engine.console.bars import Bar

    class Progress(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.bar = Bar(
                desc=title, total=1.0, file=sys.stderr, disable=quiet, leave=False, bar_format=_BAR
            )
            self.close = self.bar.close
            self.interrupted = False
            self._lock = threading.Lock()
            self._phases: dict[str, list[Any]] = {}  # phase → [parent, steps, steps done]

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases[phase_name] = [parent_phase, max(num_steps, 1), 0]
                self.bar.set_postfix_str(phase_name, refresh=False)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                with self._lock:
                    self._phases[phase_name][2] = step + 1
                    self._show(self._fraction(None))
                return True
            except KeyboardInterrupt:  # an exception cannot pass through TensorRT; False stops it
                self.interrupted = True
                return False

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                outermost = self._phases.pop(phase_name, [None])[0] is None
                self._show(1.0 if outermost else self._fraction(None))

        def _show(self, done: float) -> None:
            if done > self.bar.n:  # phases that start again must not turn the bar back
                self.bar.update(done - self.bar.n)

        def _fraction(self, parent: str | None) -> float:
            """The part that is done of the phases below ``parent``."""
            for name, (above, steps, done) in self._phases.items():
                if above == parent:
                    return min(1.0, (done + min(self._fraction(name), 0.99)) / steps)
            return 0.0

    return Progress()
