"""Names that a person can read: each node is called by the module that it belongs to.

torch's exporter numbers everything ("val_40") and writes the call stack of the exporting machine
beside each node. Here "blocks.3.attn.qkv/MatMul" is the product of that layer, its result has the
same name, and weights have the names of the checkpoint.
"""

from __future__ import annotations

import ast
from collections import Counter
from typing import Any

_SCOPES = "pkg.torch.onnx.name_scopes"
_ROOTS = ("dit", "vae")
_SHOWN = 8  # values of a constant that its name holds at most


def make_readable(model: Any) -> None:
    """Rename the nodes, values and constants of an onnx_ir Model, and drop what torch noted.

    Inputs, outputs and weights keep their names, weights without the module's root ("dit.").
    """
    graph = model.graph
    fixed = {value.name for value in (*graph.inputs, *graph.outputs)}
    taken: Counter[str] = Counter(fixed)

    def free(name: str) -> str:
        taken[name] += 1
        return name if taken[name] == 1 else f"{name}.{taken[name] - 1}"

    # torch's names could be in the way of ours.
    initializers = list(graph.initializers.values())
    parameters = {id(v): v.name for v in initializers if v.name.partition(".")[0] in _ROOTS}
    for i, value in enumerate(initializers):
        value.name = f"\0{i}"
    for value in initializers:
        name = parameters.get(id(value))
        value.name = free(_rooted(name) if name else _constant_name(value.const_value))
    for value in initializers:
        value.metadata_props.clear()
    for node in graph:
        name = free(_module(node) + node.op_type)
        node.name = name
        for i, value in enumerate(node.outputs):
            if value.name not in fixed:
                value.name = name if len(node.outputs) == 1 else f"{name}:{i}"
            value.metadata_props.clear()
        node.metadata_props.clear()
        node.doc_string = None
    for value in graph.inputs:
        value.metadata_props.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()


def _module(node: Any) -> str:
    """ "blocks.3.attn.qkv/" of a node, or nothing where the exporter has lost it."""
    if _SCOPES not in node.metadata_props:  # a Split of what the node before it made
        before = node.inputs[0].name if node.inputs and node.inputs[0] is not None else ""
        return before.rpartition("/")[0] + "/" if "/" in before else ""
    scopes = ast.literal_eval(node.metadata_props[_SCOPES])
    name = scopes[-2] if len(scopes) > 1 else ""
    # Sizes of inputs are read in no module, which torch writes as a name of its own.
    return f"{_rooted(name)}/" if name.partition(".")[0] in _ROOTS and "." in name else ""


def _rooted(name: str) -> str:
    root, _, rest = name.partition(".")
    return rest if root in _ROOTS else name


def _constant_name(tensor: Any) -> str:
    kind = tensor.dtype.name.lower()
    if tensor.size <= _SHOWN:
        values = tensor.numpy().ravel()
        whole = values.dtype.kind in "iub"
        shown = "_".join(str(int(v)) if whole else f"{float(v):g}" for v in values)
        return f"{kind}_{shown}"
    return f"{kind}_{'x'.join(map(str, tensor.shape))}"
