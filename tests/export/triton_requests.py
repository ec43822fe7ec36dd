"""Requests to the model "dit", over either protocol."""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

import numpy as np

KINDS = {"int64": "INT64", "float32": "FP32", "object": "BYTES", "bool": "BOOL"}


def column(values: list[Any], dtype: Any) -> np.ndarray:
    """One row an image, (N, 1)."""
    return np.array(values, dtype=dtype)[:, None]


def names(*labels: str) -> np.ndarray:
    return column([label.encode() for label in labels], object)


def numbers(*values: int) -> np.ndarray:
    return column(list(values), np.int64)


def scales(*values: float) -> np.ndarray:
    return column(list(values), np.float32)


def infer(
    address: str,
    inputs: dict[str, np.ndarray],
    protocol: str = "http",
    model: str = "dit",
    output: str = "images",
) -> np.ndarray:
    """Raises tritonclient's InferenceServerException for what the server refuses."""
    module = import_module(f"tritonclient.{protocol}")
    tensors = []
    for name, value in inputs.items():
        tensors.append(module.InferInput(name, list(value.shape), KINDS[value.dtype.name]))
        tensors[-1].set_data_from_numpy(value)
    with module.InferenceServerClient(address) as client:
        return client.infer(model, tensors).as_numpy(output)


def executions(address: str, model: str) -> tuple[int, int]:
    """Rows and batches that a model has computed since the server started."""
    module = import_module("tritonclient.http")
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
