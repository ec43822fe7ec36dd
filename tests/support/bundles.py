"""Exports whose graphs are empty, for tests of repositories and engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from tiny import NAMES, tiny_dit, tiny_vae

from dit_engine.io.directories import new_directory
from dit_export.bundle import Bundle, Graph, write_manifest
from dit_export.onnx.graphs import signature
from dit_export.source import weights_hash
from dit_export.targets import GRAPHS


def metadata_graph(**metadata: str) -> bytes:
    """An ONNX file with metadata and without nodes."""
    graph = onnx.helper.make_graph([], metadata["graph"], [], [])
    model = onnx.helper.make_model(graph)
    onnx.helper.set_model_props(model, metadata)
    return model.SerializeToString()


def write_bundle(path: Path, vae: bool = True, data: bool = False, **changes: Any) -> Bundle:
    """An export whose graphs are empty: here only their names and shapes matter.

    changes: of the manifest; model: a `DiT`; graphs: of the metadata of a graph, by its name;
    lay: puts files into the directory before the manifest lists them.
    """
    model, decoder = changes.pop("model", tiny_dit()), tiny_vae() if vae else None
    inside = changes.pop("graphs", {})
    lay: Callable[[Path], object] = changes.pop("lay", lambda _: None)
    names = [name for name in GRAPHS if decoder or name != "vae_decoder"]
    facts: dict[str, Any] = {
        "model": model.config.to_dict(), "vae": decoder and json.loads(decoder.config.to_json()),
        "checkpoint": weights_hash(model), "vae_checkpoint": decoder and weights_hash(decoder),
        "dtype": "fp16", "opset": 23, "target": "onnxruntime", "guided_channels": 3,
        "label_names": list(NAMES),
    } | changes  # fmt: skip
    config, dtype = None if decoder is None else decoder.config, facts["dtype"]
    graphs = [Graph(n, f"{n}.onnx", dtype, *signature(n, model.config, config)) for n in names]
    with new_directory(path) as partial:
        for graph in graphs:
            owner = "vae_checkpoint" if graph.name == "vae_decoder" else "checkpoint"
            said = {"graph": graph.name, "checkpoint": facts[owner], "dtype": dtype}
            content = metadata_graph(**(said | inside.get(graph.name, {})))
            (partial / graph.file).write_bytes(content)
            if data:
                (partial / f"{graph.file}.data").write_bytes(b"weights")
        lay(partial)
        write_manifest(partial, facts, graphs)
    return Bundle.open(path)
