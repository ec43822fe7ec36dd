"""One module as one ONNX graph, written by torch's exporter, with names that a person can read.

torch numbers everything ("val_40") and writes the call stack of the exporting machine beside each
node. Here the product of a layer is "blocks.3.attn.qkv/MatMul", its result has the same name, and
weights have the names of the checkpoint.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dit_export.bundle import ExportFailed, Graph

_SCOPES = "pkg.torch.onnx.name_scopes"


def to_onnx(module: nn.Module, graph: Graph, opset: int) -> Any:
    """``module`` as an onnx_ir Model of standard operators of ``opset``.

    Every dimension that has a name in the graph's inputs and outputs is dynamic.

    Raises ExportFailed if torch wrote another opset or fixed a dimension, which it only logs.
    """
    sizes = {"batch": 2, "height": 6, "width": 5}  # small, and all different
    dims = {size: torch.export.Dim(size) for size in sizes}
    examples, dynamic = [], []
    for spec in graph.inputs:
        shape = [n if isinstance(n, int) else sizes[n] for n in spec.shape]
        examples.append(torch.zeros(shape, dtype=getattr(torch, spec.dtype)))
        dynamic.append({i: dims[n] for i, n in enumerate(spec.shape) if isinstance(n, str)})
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            tuple(examples),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=[spec.name for spec in graph.inputs],
            output_names=[spec.name for spec in graph.outputs],
            dynamic_shapes=tuple(dynamic),
        )
    assert program is not None
    model = program.model
    if dict(model.opset_imports) != {"": opset} or model.functions:
        raise ExportFailed(
            f"{graph.name}: opset {opset} was asked for, torch wrote {dict(model.opset_imports)}"
        )
    written = (*model.graph.inputs, *model.graph.outputs)
    for value, spec in zip(written, (*graph.inputs, *graph.outputs), strict=True):
        shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape or ())
        if (value.name, shape) != (spec.name, spec.shape):
            raise ExportFailed(f"{graph.name}: {value.name} {shape}, where {spec} was meant")
    make_readable(model)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's notes about packages and interfaces that are not used here."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def make_readable(model: Any) -> None:
    """Rename the nodes, values and constants of an onnx_ir Model, and drop what torch noted.

    Inputs, outputs and weights keep their names, but weights lose the module's root ("dit.").
    """
    graph = model.graph
    fixed = {value.name for value in (*graph.inputs, *graph.outputs)}
    taken: Counter[str] = Counter(fixed)

    def free(name: str) -> str:
        taken[name] += 1
        return name if taken[name] == 1 else f"{name}.{taken[name] - 1}"

    initializers = {value: value.name for value in graph.initializers.values()}
    for i, value in enumerate(initializers):  # torch's names could be equal to new ones
        value.name = f"\0{i}"
    for value, name in initializers.items():
        value.name = free(_rooted(name) or value.const_value.dtype.name.lower())
    for node in graph:
        name = node.name = free(_module(node) + node.op_type)
        for i, value in enumerate(node.outputs):
            if value.name not in fixed:
                value.name = name if len(node.outputs) == 1 else f"{name}:{i}"
        node.doc_string = None
    made = [value for node in graph for value in node.outputs]
    for noted in (*initializers, *graph, *made, *graph.inputs, graph, model):
        noted.metadata_props.clear()


def _module(node: Any) -> str:
    """ "blocks.3.attn.qkv/" of a node, or nothing if torch did not note its module."""
    if _SCOPES not in node.metadata_props:  # a Split of what the node before it made
        before = node.inputs[0].name if node.inputs and node.inputs[0] is not None else ""
        return before.rpartition("/")[0] + "/" if "/" in before else ""
    scopes = ast.literal_eval(node.metadata_props[_SCOPES])
    # The sizes of inputs are read outside of any module; torch then writes another kind of name.
    name = _rooted(scopes[-2]) if len(scopes) > 1 else ""
    return f"{name}/" if name else ""


def _rooted(name: str) -> str:
    """The name without the module's root; nothing for a name that has none."""
    root, _, rest = name.partition(".")
    return rest if root in ("dit", "vae") else ""
