"""The Triton Inference Server that runs for the tests, its model, and requests to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from tiny import tiny_dit

from dit_engine.engine import Engine
from dit_engine.model import DiT
from dit_export.server.process import Running

MAX_BATCH_SIZE = 8
KINDS = {"int64": "INT64", "float32": "FP32", "object": "BYTES", "bool": "BOOL"}


@dataclass(frozen=True)
class Served:
    """engine: has the model that the server has; guided as its graph guides."""

    repository: Path
    running: Running
    engine: Engine

    def address(self, protocol: str) -> str:
        """As `dit_export.backends.server.RemoteServer` takes it; protocol: "http" or "grpc"."""
        return self.running.http if protocol == "http" else f"grpc+{self.running.grpc}"


def served_model() -> DiT:
    """`tiny_dit` with larger label vectors, so that label and guidance change the image clearly."""
    model = tiny_dit()
    model.y_embedder.embedding_table.weight.data *= 10.0
    return model


def names(*labels: str) -> np.ndarray:
    """(N, 1), one row per image, as `numbers` and `scales`."""
    return np.array([label.encode() for label in labels], dtype=object)[:, None]


def numbers(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)[:, None]


def scales(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)[:, None]


def tensors(inputs: dict[str, np.ndarray], protocol: str) -> list[Any]:
    """tritonclient's tensors of a request."""
    make = import_module(f"tritonclient.{protocol}").InferInput
    made = [make(name, list(v.shape), KINDS[v.dtype.name]) for name, v in inputs.items()]
    for tensor, value in zip(made, inputs.values(), strict=True):
        tensor.set_data_from_numpy(value)
    return made


def infer(
    address: str,
    inputs: dict[str, np.ndarray],
    protocol: str = "http",
    model: str = "dit",
    output: str = "images",
) -> np.ndarray:
    """Raises tritonclient's InferenceServerException for what the server refuses."""
    module: Any = import_module(f"tritonclient.{protocol}")
    with module.InferenceServerClient(address) as client:
        return client.infer(model, tensors(inputs, protocol)).as_numpy(output)


def executions(address: str, model: str) -> tuple[int, int]:
    """Rows and batches that a model has computed since the server started."""
    module: Any = import_module("tritonclient.http")
    with module.InferenceServerClient(address) as client:
        (stats,) = client.get_inference_statistics(model)["model_stats"]
    return int(stats["inference_count"]), int(stats["execution_count"])


def settled(address: str, *models: str) -> dict[str, tuple[int, int]]:
    """`executions` of each once they stand still: the server counts after it has answered."""
    found, before = {model: executions(address, model) for model in models}, None
    while found != before:
        time.sleep(0.3)
        found, before = {model: executions(address, model) for model in models}, found
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
