"""How the model "dit" asks the other models, with a server that has a GPU: they answer there."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dit_export.server import pipeline
from dit_export.server.pipeline import Facts, Failed, TritonPythonModel, _infer

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


@dataclass
class Error:
    INVALID_ARG, INTERNAL = "invalid", "internal"
    message: str
    code: str


@dataclass
class Answer:
    output_tensors: tuple[Any, ...] = ()
    error: Error | None = None


class Asked:
    """A request to "dit"."""

    def __init__(self, label: int, **more: np.ndarray) -> None:
        self.columns = {"labels": [label], "seeds": [1], "steps": [2], "sampler": [b"ddim"]} | more

    def inputs(self) -> list[Any]:
        def named(name: str, value: Any) -> Any:
            return SimpleNamespace(name=lambda: name, as_numpy=lambda: np.array(value)[:, None])

        return [named(name, value) for name, value in self.columns.items()]

    def is_cancelled(self) -> bool:
        return False


def served(monkeypatch: pytest.MonkeyPatch, infer: Any) -> TritonPythonModel:
    """The model "dit", which asks ``infer`` in place of the other models."""
    monkeypatch.setattr(pipeline, "_infer", infer)
    model = TritonPythonModel()
    model.facts = Facts((4, 4, 4), True, 10, None, {"ddim": [50, "official"]})
    return model


def infer(model: str, inputs: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
    """Latents of label 7 and pixels of label 8 are not finite; label 9 breaks the model."""
    if model == "vae_decoder":
        pixels = np.where(inputs["z"] == 8, np.nan, inputs["z"])
        return [pixels[:, :3]]
    if 9 in inputs["y"]:
        raise Failed("dit_guided_step: out of memory")
    z = np.broadcast_to(inputs["y"][:, None, None, None], inputs["z"].shape).astype(np.float32)
    z = np.where(z == 7, np.nan, z)
    return [z, z]


def test_a_clients_mistake_and_a_fault_of_ours_have_codes_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = served(monkeypatch, infer)
    broken = Asked(1)
    monkeypatch.setattr(broken, "inputs", lambda: 1 / 0)
    asked = [Asked(0), Asked(10), Asked(7), broken, Asked(8), Asked(1, steps=np.array([0]))]
    first, *others = model.execute(asked)
    assert first.error is None and first.output_tensors[0].as_numpy().shape == (1, 4, 4, 3)
    latents = (
        "the latents of image 0 of 1 are not finite, first at step 1 of 2 with guidance_scale 4: "
        "a smaller guidance_scale, or a model that is served in fp32, is needed"
    )
    pixels = (
        "vae_decoder: the pixels of image 0 of 1 are not finite, though the latents are: "
        "a decoder that is served in fp32 is needed"
    )
    expected = [
        ("invalid", "label 10 is out of range; allowed are 0 to 9"),
        ("internal", latents),
        ("internal", "ZeroDivisionError: division by zero"),
        ("internal", pixels),
        ("invalid", "steps 0 is out of range: allowed is 1 to 1000"),
    ]
    assert [(answer.error.code, answer.error.message) for answer in others] == expected
    failed = model.execute([Asked(9), Asked(0)])
    assert [(a.error.code, a.error.message) for a in failed] == [
        ("internal", "dit_guided_step: out of memory")
    ] * 2


def test_what_nobody_thought_of_fails_the_request_and_not_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raises(*_: object) -> Any:
        raise MemoryError("no room\nat all")

    (answer,) = served(monkeypatch, raises).execute([Asked(0)])
    assert answer.error == Error("the sampling loop: no room at all", "internal")


@pytest.fixture(autouse=True)
def utilities(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceRequest = Tensor, Request
    module.TritonModelException = ModelException
    module.TRITONSERVER_MEMORY_CPU = CPU
    module.TritonError, module.InferenceResponse = Error, Answer
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
    with pytest.raises(Failed, match=f"^{message}$"):
        _infer(model, {"z": np.ones(1)}, ["z"])
