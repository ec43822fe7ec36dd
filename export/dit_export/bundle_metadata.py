"""What an ONNX file says of itself and of the files beside it."""

from __future__ import annotations

from collections.abc import Container, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from dit_engine.files import check_regular
from dit_engine.printable import one_line
from dit_export.bundle import Bundle
from dit_export.graphs import VAE_GRAPH

_DOMAINS = ("", "ai.onnx")


def check_metadata(bundle: Bundle, name: str) -> None:
    """Raises ValueError where graph ``name`` was exported from another model, or as another graph,
    or has its weights in another file than an export does.

    The manifest's SHA-256 cannot tell that, should a file have been put there and listed by hand.
    Raises ImportError, naming the extra, without the package onnx.
    """
    file, graph = bundle.file(name), bundle.graph(name)
    model = _contained(file, f"{file.name}.data", bundle.manifest["files"])
    said = {pair.key: pair.value for pair in model.metadata_props}
    expected = {
        "graph": name,
        "checkpoint": bundle.vae_checkpoint if name == VAE_GRAPH else bundle.checkpoint,
        "dtype": graph.dtype,
    }
    for key, value in expected.items():
        if said.get(key) != value:
            raise ValueError(
                f"{file}: comes from another export: its {key} is {said.get(key)!r}, where the "
                f"manifest has {value!r}"
            )


def check_contained(file: Path, weights: str | None = None) -> None:
    """Raises ValueError for a graph that reads other files than ``weights`` beside it (by default
    ``<file>.data``), or that needs other operators than ONNX's own: a runtime would look for these
    in libraries and files."""
    weights = weights or f"{file.name}.data"
    _contained(file, weights, [weights])


def _contained(file: Path, weights: str, others: Container[str]) -> Any:
    """The ModelProto of a file, without the weights beside it, which must be among ``others``."""
    try:
        onnx = import_module("onnx")
    except ImportError:
        raise ImportError("onnx is not installed: pip install 'dit-engine[onnx]'") from None
    check_regular(file)
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's
        raise ValueError(f"{file}: is not an ONNX file: {one_line(error)}") from None
    if model.functions or model.training_info:
        raise ValueError(f"{file}: holds functions or training, which no export does")
    for message in _messages(model):
        if isinstance(message, onnx.NodeProto) and message.domain not in _DOMAINS:
            operator = f"{message.domain}.{message.op_type}"
            raise ValueError(f"{file}: operator {operator!r} is not of ONNX; no export has it")
        if not isinstance(message, onnx.TensorProto):
            continue
        if message.data_location != onnx.TensorProto.EXTERNAL and not message.external_data:
            continue
        places = [entry.value for entry in message.external_data if entry.key == "location"]
        if places != [weights] or weights not in others:
            raise ValueError(
                f"{file}: tensor {message.name!r} lies in {places}; only {weights} is read, and "
                "only where the manifest lists it"
            )
        check_regular(file.with_name(weights))
    return model


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all that it holds, at any depth: subgraphs, attributes, tensors."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(each)
