"""An ONNX graph's adaLN, five nodes of standard operators, as one node of the plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dit_export.tensorrt.plugin import EPS, NAME, NAMESPACE


def fuse_file(source: Path, target: Path) -> int:
    """`fuse` for a file; weights outside it are put beside ``target``. How many were fused."""
    import onnx

    model = onnx.load(str(source))
    count = fuse(model)
    # Not ByteSize, which protobuf refuses above 2 GiB.
    external = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > 2**30
    onnx.save(model, str(target), save_as_external_data=external, location=f"{target.name}.data")
    return count


def fuse(model: Any) -> int:
    """Put a ``dit::layernorm_modulate`` node in the place of every adaLN of an onnx ModelProto.

    adaLN is LayerNormalization without weights · (1 + scale) + shift, with scale and shift (N, D).
    """
    from onnx import helper

    graph = _Index(model.graph)
    count = 0
    for norm in [n for n in model.graph.node if n.op_type == "LayerNormalization"]:
        match = _match(graph, norm)
        if match is None:
            continue
        last, shift, scale = match
        node = helper.make_node(
            NAME,
            [norm.input[0], shift, scale],
            list(last.output),
            name=f"{norm.name.rpartition('/')[0] or norm.name}/{NAME}",
            domain=NAMESPACE,
            plugin_version="1",
            plugin_namespace=NAMESPACE,
        )
        place = list(model.graph.node).index(last)
        model.graph.node.remove(last)
        model.graph.node.insert(place, node)
        count += 1
    _remove_unused(model.graph)
    if count:
        model.opset_import.append(helper.make_opsetid(NAMESPACE, 1))
    return count


class _Index:
    """Who makes and who reads a tensor, and the constants."""

    def __init__(self, graph: Any) -> None:
        from onnx import numpy_helper

        self.maker = {output: node for node in graph.node for output in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {output.name for output in graph.output}
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._to_array = numpy_helper.to_array

    def only_reader(self, node: Any) -> Any | None:
        """The one node that reads what ``node`` makes, and nothing else does."""
        name = node.output[0]
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def is_constant(self, name: str, value: float) -> bool:
        if name in self._constants:
            array = self._to_array(self._constants[name])
        elif (maker := self.maker.get(name)) is not None and maker.op_type == "Constant":
            array = self._to_array(maker.attribute[0].t)
        else:
            return False
        return bool(np.all(array.astype(np.float64) == value))

    def unsqueezed(self, name: str) -> str | None:
        """What ``name`` is, (N, 1, D), as (N, D)."""
        maker = self.maker.get(name)
        if maker is None or maker.op_type != "Unsqueeze" or not self.is_constant(maker.input[1], 1):
            return None
        return maker.input[0]

    def plus(self, node: Any, other: str) -> str | None:
        """The summand of an Add beside ``other``."""
        names = list(node.input)
        if node.op_type != "Add" or other not in names:
            return None
        names.remove(other)
        return names[0]


def _match(graph: _Index, norm: Any) -> tuple[Any, str, str] | None:
    """(the last node, shift, scale) of the adaLN that begins with ``norm``."""
    attributes = {a.name: a for a in norm.attribute}
    eps = attributes["epsilon"].f if "epsilon" in attributes else 1e-5
    axis = attributes["axis"].i if "axis" in attributes else -1
    bias = norm.input[2] if len(norm.input) > 2 else ""
    plain = graph.is_constant(norm.input[1], 1) and (not bias or graph.is_constant(bias, 0))
    if axis not in (-1, 2) or not np.isclose(eps, EPS, rtol=1e-3) or not plain:
        return None
    scaled = graph.only_reader(norm)
    if scaled is None or scaled.op_type != "Mul":
        return None
    factor = next(name for name in scaled.input if name != norm.output[0])
    sum_ = graph.maker.get(factor)
    if sum_ is None:
        return None
    one = next((name for name in sum_.input if graph.is_constant(name, 1)), None)
    wide = graph.plus(sum_, one) if one is not None else None
    scale = graph.unsqueezed(wide) if wide is not None else None
    last = graph.only_reader(scaled)
    if scale is None or last is None:
        return None
    shifted = graph.plus(last, scaled.output[0])
    shift = graph.unsqueezed(shifted) if shifted is not None else None
    return None if shift is None else (last, shift, scale)


def _remove_unused(graph: Any) -> None:
    while True:
        read = {name for node in graph.node for name in node.input}
        read |= {output.name for output in graph.output}
        unused = [node for node in graph.node if not read & set(node.output)]
        if not unused:
            break
        for node in unused:
            graph.node.remove(node)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)
