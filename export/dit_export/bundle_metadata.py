"""What an ONNX file says of itself, against the manifest beside it."""

from __future__ import annotations

from importlib import import_module

from dit_export.bundle import Bundle
from dit_export.graphs import VAE_GRAPH


def check_metadata(bundle: Bundle, name: str) -> None:
    """Raises ValueError where graph ``name`` was exported from another model, or as another graph.

    The manifest's SHA-256 cannot tell that, should a file have been put there and listed by hand.
    Raises ImportError, naming the extra, without the package onnx.
    """
    try:
        onnx = import_module("onnx")
    except ImportError:
        raise ImportError("onnx is not installed: pip install 'dit-engine[onnx]'") from None
    file, graph = bundle.file(name), bundle.graph(name)
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's
        raise ValueError(f"{file}: is no ONNX file: {error}") from None
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
