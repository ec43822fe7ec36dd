"""How the model "dit" asks the other models, with a server that has a GPU: they answer there."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dit_export.triton.pipeline import Refused, _infer

CPU, GPU = 0, 1


@dataclass
class Tensor:
    name: str
    value: np.ndarray
    memory: int = CPU

    def as_numpy(self) -> np.ndarray:
        if self.memory == GPU:  # as Triton's
            raise RuntimeError("Tensor is stored in GPU and cannot be converted to NumPy")
        return self.value


class Response:
    def __init__(self, *tensors: Tensor, refusal: str | None = None) -> None:
        self.tensors, self.refusal = tensors, refusal

    def has_error(self) -> bool:
        return self.refusal is not None

    def error(self) -> Response:
        return self

    def message(self) -> str | None:
        return self.refusal


@dataclass
class Request:
    """To a model that doubles; without a preferred memory, its tensors are where it computes."""

    model_name: str
    requested_output_names: list[str]
    inputs: list[Tensor]
    preferred_memory: int = GPU

    def exec(self) -> Response:
        if self.model_name == "absent":
            raise ModelException("it is not loaded")
        if self.model_name == "broken":
            return Response(refusal="out of memory")
        named = {tensor.name: 2 * tensor.value for tensor in self.inputs}
        return Response(*(Tensor(n, v, self.preferred_memory) for n, v in named.items()))


class ModelException(Exception):
    pass


@pytest.fixture(autouse=True)
def utilities(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceRequest = Tensor, Request
    module.TritonModelException = ModelException
    module.TRITONSERVER_MEMORY_CPU = CPU
    module.PreferredMemory = lambda kind, _device: kind
    module.get_output_tensor_by_name = lambda response, name: next(
        tensor for tensor in response.tensors if tensor.name == name
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)


def test_answers_come_to_the_host() -> None:
    z, t = np.ones((2, 4), np.float32), np.arange(2)
    doubled, times = _infer("doubler", {"z": z, "t": t}, ["z", "t"])
    np.testing.assert_array_equal(doubled, 2 * z)
    np.testing.assert_array_equal(times, [[0], [2]])  # one number a row, (N, 1)


@pytest.mark.parametrize(
    ("model", "message"),
    [("absent", "absent: it is not loaded"), ("broken", "broken: out of memory")],
)
def test_errors_name_the_model(model: str, message: str) -> None:
    with pytest.raises(Refused, match=f"^{message}$"):
        _infer(model, {"z": np.ones(1)}, ["z"])
