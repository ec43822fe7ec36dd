"""What looks at a graph after its export: onnx's checker, and a run beside torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dit_engine.io.printable import one_line
from dit_engine.sampling.coefficients import step_coefficients
from dit_engine.sampling.schedule import make_schedule
from dit_export.bundle import ExportFailed, Graph
from dit_export.onnx.files import check_contained
from dit_export.onnx.graphs import Conditioner, Denoiser
from dit_export.onnx.upcast import upcast_file
from dit_export.targets import VAE_GRAPH

BOUNDS = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 5e-2, "int8": 5e-2, "fp8": 5e-2}
"""Of max |graph − torch| / max |torch|, torch in float32 with the weights as they came. A value at
the edge between two codes may be rounded either way, which is a whole step of the grid."""

LARGE_BYTES = 512 * 2**20
"""Graphs above are run without onnxruntime's optimisations, in less memory."""

Runner = Callable[[dict[str, np.ndarray]], list[np.ndarray]]

T = TypeVar("T")


def verify_graph(
    directory: Path, graph: Graph, module: nn.Module, exact: nn.Module | None = None
) -> Graph:
    """``graph`` with its errors and with what looked at it.

    Args:
        module: the same function in torch, in float32.
        exact: for a quantised graph the function without the rounding, in float32.

    Raises ExportFailed where it is no valid ONNX, cannot be run, or its error is too large.
    """
    path = directory / graph.file
    check_contained(path)
    verified = check(path, graph.name)
    relative, accuracy = 0.0, [0.0, 0.0]
    with _runner(path, graph) as (runner, runs_with):
        for batch in (1, 3):  # 3 is no batch that the export has seen
            inputs = random_inputs(graph, module, batch)
            actual = runner({name: value.numpy() for name, value in inputs.items()})
            for a, b in zip(actual, _call(module, inputs), strict=True):
                relative = max(relative, relative_error(a, b))
            for a, b in zip(actual, _call(exact, inputs) if exact else (), strict=False):
                errors = relative_error(a, b), rms_error(a, b)
                accuracy = [max(pair) for pair in zip(accuracy, errors, strict=True)]
    bound = BOUNDS[graph.dtype]
    if not relative <= bound:
        raise ExportFailed(
            f"{graph.name}: {runs_with} and torch differ by {relative:.2e}, above {bound:.0e}"
        )
    rounding = ", rounded alike" if exact is not None else ""
    error = {"against": f"torch in float32{rounding}", "relative": relative, "bound": bound}
    graph = replace(graph, error=error, verified_by=(verified, runs_with))
    if exact is None:
        return graph
    measured = dict(zip(("relative", "rms"), accuracy, strict=True))
    return replace(graph, accuracy={"against": "torch in float32, not quantised", **measured})


def _call(module: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        outputs = module(*inputs.values())
    return outputs if isinstance(outputs, tuple) else (outputs,)


def check(path: Path, name: str) -> str:
    """onnx's checker with strict shape inference; returns what it is called in the manifest."""
    onnx = import_module("onnx")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportFailed(f"{name}: no valid ONNX: {error}") from None
    return f"onnx.checker {onnx.__version__} with shape inference"


def relative_error(actual: Any, expected: Tensor) -> float:
    """max |actual − expected| / max |expected|; infinite where either is not finite."""
    a, b = torch.as_tensor(actual).double(), expected.double()
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def rms_error(actual: Any, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖."""
    a, b = torch.as_tensor(actual).double(), expected.double()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def random_inputs(graph: Graph, module: nn.Module, batch: int) -> dict[str, Tensor]:
    """Inputs as sampling would give them: steps and labels of every kind, and their modulations."""
    generator = torch.Generator().manual_seed(batch)
    inputs: dict[str, Tensor] = {}
    for spec in graph.inputs:
        sizes = {"batch": batch, "height": 8 + batch, "width": 8}
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        inputs[spec.name] = torch.randn(shape, generator=generator, dtype=torch.float32)
    if graph.name == VAE_GRAPH:
        return inputs
    dit: Any = module.dit
    t = torch.randint(0, 1000, (batch,), generator=generator)
    y = torch.randint(0, dit.config.label_rows, (batch,), generator=generator)
    if "t" in inputs:
        inputs |= {"t": t, "y": y}
    if "guidance_scale" in inputs:
        inputs["guidance_scale"] = torch.tensor([1.5, 1.0, 4.0], dtype=torch.float32)[
            torch.arange(batch) % 3
        ]
        steps = torch.arange(batch) * 5 + 8
        table = step_coefficients("ddpm", make_schedule(20, "official"), dit.config.learn_sigma)
        inputs["coefficients"] = torch.from_numpy(table).float()[steps]
    if isinstance(module, Denoiser):
        with torch.inference_mode():
            inputs["modulations"] = Conditioner(dit)(t, y)
    return inputs


@contextmanager
def _runner(path: Path, graph: Graph) -> Iterator[tuple[Runner, str]]:
    """What runs the graph here, and its name.

    onnxruntime has hardly a bfloat16 operator for the CPU. OpenVINO, an optional package, has;
    without it, the graph is run in float32 with the weights that it has.
    """
    with ExitStack() as stack:
        make, suffix = _onnxruntime, ""
        if graph.dtype == "bf16" and find_spec("openvino") is not None:
            make = _openvino
        elif graph.dtype == "bf16":
            folder = stack.enter_context(TemporaryDirectory(dir=path.parent))
            wide = Path(folder) / path.name
            upcast_file(path, wide)
            path, suffix = wide, " in float32"
        runner, name = _guarded(graph.name, make, path)
        yield partial(_guarded, graph.name, runner), name + suffix


def _guarded(graph: str, call: Callable[..., T], *arguments: Any) -> T:
    """``call`` of a runtime, whose exceptions share no base class but Exception."""
    try:
        return call(*arguments)
    except (MemoryError, OSError):
        raise
    except Exception as error:
        raise ExportFailed(f"{graph}: cannot be run: {one_line(error)}") from error


def _onnxruntime(path: Path) -> tuple[Runner, str]:
    ort = import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # One run each: packed weights would be one more copy of all of them, for nothing, and so would
    # float32 copies of half-precision ones, which an optimised graph keeps (XL/2: 4.3 GB, not 3.1).
    options.add_session_config_entry("session.disable_prepacking", "1")
    if sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) > LARGE_BYTES:
        options.enable_cpu_mem_arena = False
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs), f"onnxruntime {ort.__version__}"


@functools.cache
def _openvino_core() -> Any:
    """The one of this process: plugins of several that go in another order than they came leave the
    thread without a stack for signals, and the process dies of the next one."""
    return import_module("openvino").Core()


def _openvino(path: Path) -> tuple[Runner, str]:
    openvino, core = import_module("openvino"), _openvino_core()
    # By itself it would compute the float32 parts in bfloat16 too, and among them the time
    # embedding's angles of up to 1000 radians.
    compiled = core.compile_model(str(path), "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"})

    def run(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        results = compiled(inputs)
        return [results[output] for output in compiled.outputs]

    return run, f"OpenVINO {openvino.__version__.split('-')[0]}"
