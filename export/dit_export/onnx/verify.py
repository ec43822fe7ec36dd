"""What checks a graph after its export: onnx's checker, and a run beside torch."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dit_engine.io.printable import one_line
from dit_engine.sampling.coefficients import step_coefficients
from dit_engine.sampling.schedule import make_schedule
from dit_export.bundle import ExportFailed, Graph
from dit_export.onnx.files import check_contained
from dit_export.onnx.graphs import Conditioner, Denoiser
from dit_export.targets import QUANTIZED, VAE_GRAPH

BOUNDS = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 5e-2, "int8": 5e-2, "fp8": 5e-2}
"""Of max |graph − torch| / max |torch|, with torch in float32 and weights that are not rounded. A
value at the edge between two codes may be rounded either way, which is a whole step of the grid."""

LARGE_BYTES = 512 * 2**20
"""Larger graphs are run without onnxruntime's optimisations, which takes less memory."""


def verify_graph(directory: Path, graph: Graph, module: nn.Module) -> Graph:
    """``graph`` with its error and the names of what checked it. The error is that against
    ``module``, the same function in torch in float32.

    onnxruntime has very few bfloat16 operators for the CPU, so a bfloat16 graph is run in float32
    with the weights that it has.

    Raises ExportFailed if the graph is not valid ONNX, cannot be run, or has too large an error.
    """
    path, wide = directory / graph.file, graph.dtype == "bf16"
    check_contained(path)
    onnx, runner = import_module("onnx"), f"onnxruntime {import_module('onnxruntime').__version__}"
    try:
        onnx.checker.check_model(str(path), full_check=True)  # with strict shape inference
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportFailed(f"{graph.name}: no valid ONNX: {error}") from None
    checker = f"onnx.checker {onnx.__version__} with shape inference"
    batches = [random_inputs(graph, module, n) for n in (1, 3)]  # the exporter has not seen 3
    with TemporaryDirectory(dir=directory) if wide else nullcontext(directory) as folder:
        if wide:
            upcast_file(path, Path(folder) / path.name)
        outputs = _run(Path(folder) / path.name, graph.name, batches)
    relative = 0.0
    for inputs, actual in zip(batches, outputs, strict=True):
        with torch.inference_mode():
            expected = module(*inputs.values())
        expected = expected if isinstance(expected, tuple) else (expected,)
        for a, b in zip(actual, expected, strict=True):
            relative = max(relative, relative_error(a, b))
    bound = BOUNDS[graph.dtype]
    if not relative <= bound:
        raise ExportFailed(
            f"{graph.name}: {runner} and torch differ by {relative:.2e}, above {bound:.0e}"
        )
    against = "torch in float32" + (", rounded alike" if graph.dtype in QUANTIZED else "")
    return replace(
        graph,
        error={"against": against, "relative": relative, "bound": bound},
        verified_by=(checker, runner + (" in float32" if wide else "")),
    )


def relative_error(actual: Any, expected: Tensor) -> float:
    """max |actual − expected| / max |expected|; infinite if a number in either is not finite."""
    a, b = torch.as_tensor(actual).double(), expected.double()
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def random_inputs(graph: Graph, module: nn.Module, batch: int) -> dict[str, Tensor]:
    """Inputs as sampling would give them: steps and labels of every kind, and their modulations."""
    generator = torch.Generator().manual_seed(batch)
    sizes = {"batch": batch, "height": 8 + batch, "width": 8}
    inputs: dict[str, Tensor] = {}
    for spec in graph.inputs:
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
        rows = torch.arange(batch)
        inputs["guidance_scale"] = torch.tensor([1.5, 1.0, 4.0], dtype=torch.float32)[rows % 3]
        table = step_coefficients("ddpm", make_schedule(20, "official"), dit.config.learn_sigma)
        inputs["coefficients"] = torch.from_numpy(table).float()[rows * 5 + 8]
    if isinstance(module, Denoiser):
        with torch.inference_mode():
            inputs["modulations"] = Conditioner(dit)(t, y)
    return inputs


def _run(path: Path, name: str, batches: list[dict[str, Tensor]]) -> list[list[np.ndarray]]:
    """The graph's outputs for each of several inputs, computed by onnxruntime on the CPU."""
    ort = import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # The graph runs only twice. Packed weights would be one more copy of all of them, and so would
    # the float32 copies that an optimised half-precision graph keeps (XL/2: 4.3 GB and not 3.1).
    options.add_session_config_entry("session.disable_prepacking", "1")
    if sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) > LARGE_BYTES:
        options.enable_cpu_mem_arena = False
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return [session.run(None, {k: v.numpy() for k, v in b.items()}) for b in batches]
    except (MemoryError, OSError):
        raise
    except Exception as error:  # those of onnxruntime share no other base class
        raise ExportFailed(f"{name}: cannot be run: {one_line(error)}") from error


def upcast_file(source: Path, target: Path) -> None:
    """Write the ONNX file ``source`` with float32 in the place of bfloat16; its weights go beside
    it. Every bfloat16 number is a float32 number, so the nodes and weights stay the same."""
    onnx = import_module("onnx")
    kinds = onnx.TensorProto
    model = onnx.load(str(source))
    graph = model.graph
    del graph.value_info[:]  # the types of intermediate values, which inference finds again
    tensors = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                tensors.append(attribute.t)
            elif attribute.type == onnx.AttributeProto.INT and attribute.i == kinds.BFLOAT16:
                names = ("to", "dtype", "output_dtype", "softmax_precision")
                attribute.i = kinds.FLOAT if attribute.name in names else attribute.i
    for tensor in tensors:
        if tensor.data_type == kinds.BFLOAT16:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == kinds.BFLOAT16:
            value.type.tensor_type.elem_type = kinds.FLOAT
    onnx.save(
        model, str(target), save_as_external_data=True, location=f"{target.name}.data",
        size_threshold=1024,
    )  # fmt: skip
