"""A bfloat16 graph as the same graph in float32: its own nodes and weights, in wider arithmetic.

onnxruntime has hardly a bfloat16 operator for the CPU. Every bfloat16 number is a float32 one, so
that what this graph computes differs from what the model does by the rounding of its weights alone.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "softmax_precision")


def upcast_file(source: Path, target: Path) -> None:
    """Write the ONNX file ``source`` with float32 in the place of bfloat16; weights lie beside."""
    onnx = import_module("onnx")
    model = onnx.load(str(source))
    upcast(model)
    onnx.save(
        model, str(target), save_as_external_data=True, location=f"{target.name}.data",
        size_threshold=1024,
    )  # fmt: skip


def upcast(model: Any) -> None:
    """Of an onnx ModelProto without functions or subgraphs, in place."""
    onnx = import_module("onnx")
    kinds, graph = onnx.TensorProto, model.graph
    assert not model.functions
    del graph.value_info[:]  # types of what lies between, which inference finds again
    for tensor in graph.initializer:
        _upcast_tensor(tensor)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == kinds.BFLOAT16:
            value.type.tensor_type.elem_type = kinds.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            assert not attribute.HasField("g") and not attribute.graphs
            if attribute.HasField("t"):
                _upcast_tensor(attribute.t)
            elif attribute.name in _TYPE_ATTRIBUTES and attribute.i == kinds.BFLOAT16:
                attribute.i = kinds.FLOAT


def _upcast_tensor(tensor: Any) -> None:
    onnx = import_module("onnx")
    if tensor.data_type == onnx.TensorProto.BFLOAT16:
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
