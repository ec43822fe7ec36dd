"""ONNX files: written, and checked before a runtime reads them."""

from __future__ import annotations

from collections.abc import Container, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dit_engine.io.files import check_regular
from dit_engine.io.printable import one_line
from dit_export.bundle import Bundle
from dit_export.targets import VAE_GRAPH


def require_onnx(*packages: str) -> None:
    """Raise ImportError, which names the extra, if a package that an export needs is missing."""
    for package in packages or ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise ImportError(f"{package} is not installed: pip install 'dit-engine[onnx]'")


def save(model: Any, path: Path, external_data_mib: int) -> None:
    """Write an onnx_ir Model; if it is larger than the limit, its weights go to ``<path>.data``."""
    ir = import_module("onnx_ir")
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    large = size > external_data_mib * 2**20
    external = {"external_data": f"{path.name}.data", "size_threshold_bytes": 1024} if large else {}
    ir.save(model, path, **external)


def check_metadata(bundle: Bundle, name: str) -> None:
    """Raise ValueError if graph ``name`` was exported from another model or as another graph, or
    fails `check_contained`.

    The SHA-256 in the manifest cannot show this: somebody may have put a file there and listed it.
    Raises ImportError, with the extra to install, if the package onnx is missing.
    """
    file = bundle.file(name)
    model = _contained(file, f"{file.name}.data", bundle.manifest["files"])
    said = {pair.key: pair.value for pair in model.metadata_props}
    expected = {
        "graph": name,
        "checkpoint": bundle.vae_checkpoint if name == VAE_GRAPH else bundle.checkpoint,
        "dtype": bundle.graph(name).dtype,
    }
    for key, value in expected.items():
        if said.get(key) != value:
            raise ValueError(
                f"{file}: comes from another export: its {key} is {said.get(key)!r}, where the "
                f"manifest has {value!r}"
            )


def check_contained(file: Path, weights: str | None = None) -> None:
    """Raise ValueError if a graph reads any file except ``weights`` beside it (by default
    ``<file>.data``), or needs operators other than ONNX's own, for which a runtime would load
    libraries or other files."""
    weights = weights or f"{file.name}.data"
    _contained(file, weights, [weights])


def _contained(file: Path, weights: str, others: Container[str]) -> Any:
    """The ModelProto of a file, checked. If its weights are in another file, that file must have
    the name ``weights`` and be among ``others``; it is not loaded."""
    require_onnx("onnx")
    onnx = import_module("onnx")
    check_regular(file)
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # raised by protobuf
        raise ValueError(f"{file}: is not an ONNX file: {one_line(error)}") from None
    if model.functions or model.training_info:
        raise ValueError(
            f"{file}: holds functions or training information, which exports never have"
        )
    for message in _messages(model):
        if isinstance(message, onnx.NodeProto) and message.domain not in ("", "ai.onnx"):
            operator = f"{message.domain}.{message.op_type}"
            raise ValueError(f"{file}: operator {operator!r} is not one of ONNX's own")
        if not isinstance(message, onnx.TensorProto):
            continue
        if message.data_location != onnx.TensorProto.EXTERNAL and not message.external_data:
            continue
        places = [entry.value for entry in message.external_data if entry.key == "location"]
        if places != [weights] or weights not in others:
            raise ValueError(
                f"{file}: tensor {message.name!r} is stored in {places}; only {weights} is "
                "allowed, and only if the manifest lists it"
            )
        check_regular(file.with_name(weights))
    return model


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all messages in it, at any depth: subgraphs, attributes, tensors."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(each)
