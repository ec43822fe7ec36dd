"""Requests to the models in Python, without a server: what their rows are, and their answers."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny import NAMES

from dit_engine.sampling.diffusion import PUBLISHED_DIFFUSION, Diffusion
from dit_export.server import onnxruntime_backend, pipeline
from dit_export.server.pipeline import TritonPythonModel, parse_rows
from dit_export.server.sampling import Facts, TorchGenerator

SAMPLERS = {"ddpm": [250, "official"], "ddim": [50, "official"]}
FACTS = Facts((4, 8, 8), True, 10, list(NAMES), SAMPLERS, PUBLISHED_DIFFUSION)


def column(*values: Any) -> np.ndarray:
    """(N, 1), as Triton gives it."""
    kind = {int: np.int64, float: np.float32, bytes: object, bool: bool}[type(values[0])]
    return np.array(values, dtype=kind)[:, None]


GOOD = {"labels": column(3), "seeds": column(5)}


def test_rows_of_a_request() -> None:
    inputs = {"label_names": column(b"dog", b"4"), "seeds": column(5, 6), "steps": column(7, 8),
              "guidance_scale": column(1.0, 2.5), "sampler": column(b"ddim", b"ddpm")}  # fmt: skip
    rows = parse_rows(inputs, FACTS)
    assert [(r.label, r.steps, r.scale, r.draws.any()) for r in rows] == [
        (3, 7, 1.0, False), (4, 8, 2.5, True),
    ]  # fmt: skip
    for row, seed in zip(rows, (5, 6), strict=True):
        np.testing.assert_array_equal(row.z, TorchGenerator(seed).randn((4, 8, 8)))
    (row,) = parse_rows(GOOD, FACTS)
    assert (row.steps, row.scale, row.draws.any()) == (250, 4.0, True)
    few = replace(FACTS, diffusion=Diffusion(num_train_steps=100))
    assert [row.steps for row in parse_rows(GOOD, few)] == [100]
    with pytest.raises(ValueError, match="steps 101 is out of range: allowed is 1 to 100"):
        parse_rows(GOOD | {"steps": column(101)}, few)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.zeros((1, 2), np.int64)}, r"labels is int64 \(1, 2\); int64 \(1, 1\) is"),
        ({"labels": column(True)}, "labels is bool"),
        ({"labels": column(10)}, "label 10 is out of range; allowed are 0 to 9"),
        ({"labels": column(3, 3)}, r"labels is int64 \(2, 1\); int64 \(1, 1\) is needed"),
        (dict.fromkeys(GOOD, np.zeros((0, 1), np.int64)), "labels is empty"),
        ({"steps": column(5, 5)}, r"steps is int64 \(2, 1\)"),
        ({"seeds": column(-1)}, "seed -1 is not 0 or more"),
        ({"guidance_scale": column(np.nan)}, "guidance_scale nan is not a finite number of 0"),
        ({"guidance_scale": column(-1.0)}, "guidance_scale -1.0 is not a finite number of 0"),
        ({"sampler": column(b"\xff")}, r"sampler: text b'\\xff' is not UTF-8"),
        ({"sampler": column(b"euler")}, "sampler 'euler': choose one of ddpm"),
        ({"label_names": column(b"bee")}, "give one of labels .numbers. and label_names"),
        ({"labels": None}, "give one of labels .numbers. and label_names"),
        ({"seeds": None}, "seeds is missing"),
        ({"host": column(b"x")}, "input 'host' is unknown; known are labels, "),
    ],
)
def test_rows_that_are_refused(changes: dict[str, np.ndarray | None], message: str) -> None:
    inputs = {name: value for name, value in (GOOD | changes).items() if value is not None}
    with pytest.raises(ValueError, match=f"^{message}"):
        parse_rows(inputs, FACTS)


class Tensor:
    """A tensor as Triton gives it to Python models."""

    def __init__(self, name: str, value: np.ndarray) -> None:
        self.name, self.as_numpy = lambda: name, lambda: value


class Error:
    INVALID_ARG, INTERNAL = "invalid", "internal"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self.message, self.code = lambda: message, code


class Response:
    def __init__(self, output_tensors: Any = (), error: Error | None = None) -> None:
        self.tensors, self.error = {t.name(): t.as_numpy() for t in output_tensors}, lambda: error
        self.has_error = lambda: error is not None


class Request(SimpleNamespace):
    """To a model that doubles. It must be asked for an answer that numpy can read."""

    def exec(self) -> Response:
        if self.model_name == "broken":
            return Response(error=Error("out of memory"))
        assert self.preferred_memory == "CPU"
        return Response(Tensor(t.name(), 2 * t.as_numpy()) for t in self.inputs)


@pytest.fixture(autouse=True)
def utilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that Triton gives to Python models."""
    module: Any = ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceRequest, module.InferenceResponse = Tensor, Request, Response
    module.TritonError, module.TRITONSERVER_MEMORY_CPU = Error, "CPU"
    module.PreferredMemory = lambda kind, _device: kind
    module.get_output_tensor_by_name = lambda answer, name: Tensor(name, answer.tensors[name])
    module.get_input_tensor_by_name = lambda asked, name: Tensor(name, asked.columns[name])
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)


def asked(cancelled: bool = False, **columns: np.ndarray) -> Any:
    """A request to "dit", or to the graph of `test_the_backend_in_python`."""
    return SimpleNamespace(
        columns=columns, inputs=lambda: list(map(Tensor, columns, columns.values())),
        parameters=lambda: "{}", is_cancelled=lambda: cancelled,
        requested_output_names=lambda: ["out"],
    )  # fmt: skip


def images_of(*labels: int, cancelled: bool = False) -> Any:
    rows = {"labels": 0, "seeds": 1, "steps": 2, "sampler": b"ddim"}
    columns = {name: column(*[value] * len(labels)) for name, value in rows.items()}
    return asked(cancelled, **columns | {"labels": column(*labels)})


def test_mistakes_of_clients_and_faults_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents of label 7 and pixels of label 8 are not finite; label 9 breaks the model."""
    steps: list[int] = []

    def infer(model: str, inputs: dict[str, np.ndarray], _: list[str]) -> list[np.ndarray]:
        if model == "vae_decoder":
            return [np.where(inputs["z"] == 8, np.nan, inputs["z"])[:, :3]]
        steps.append(len(inputs["y"]))
        if 9 in inputs["y"]:
            raise RuntimeError("dit_guided_step: out of memory")
        z = np.broadcast_to(inputs["y"][:, None, None, None], inputs["z"].shape)
        return [np.where(z == 7, np.nan, z).astype(np.float32)] * 2

    monkeypatch.setattr(pipeline, "_infer", infer)
    model = TritonPythonModel()
    model.facts = replace(FACTS, shape=(4, 4, 4))
    broken = images_of(1)
    monkeypatch.setattr(broken, "inputs", lambda: 1 / 0)
    first, second, *others = model.execute(
        [images_of(0, 1), images_of(0), images_of(10), images_of(7), broken, images_of(1, 8)]
    )
    made = [answer.tensors["images"] for answer in (first, second)]
    assert [images.shape for images in made] == [(2, 4, 4, 3), (1, 4, 4, 3)]
    assert [image.max() for images in made for image in images] == [128, 255, 128]
    for answer, code, message in zip(
        others,
        ("invalid", "internal", "internal", "internal"),
        ("label 10 is out of range; allowed are 0 to 9",
         "the latents of image 0 of 1 are not finite with guidance_scale 4",
         "division by zero", "vae_decoder: the pixels of image 1 of 2 are not finite"),
        strict=True,
    ):  # fmt: skip
        assert answer.error().code == code and answer.error().message().startswith(message)
    for answer in model.execute([images_of(9), images_of(0)]):
        assert answer.error().message() == "dit_guided_step: out of memory"
        assert answer.error().code == "internal"
    (answer,) = model.execute([images_of(10)])
    assert answer.error().code == "invalid"
    steps.clear()
    model.execute([images_of(0, cancelled=True), images_of(1, cancelled=True)])
    assert steps == []
    model.execute([images_of(0, cancelled=True), images_of(1)])
    assert steps == [2, 2]


def test_the_loop_asks_other_models() -> None:
    z, t = np.ones((2, 4), np.float32), np.arange(2)
    doubled, times = pipeline._infer("doubler", {"z": z, "t": t}, ["z", "t"])
    np.testing.assert_array_equal(doubled, 2 * z)
    np.testing.assert_array_equal(times, [[0], [2]])  # one number per row, (N, 1)
    with pytest.raises(RuntimeError, match=r"^broken: out of memory$"):
        pipeline._infer("broken", {"z": np.ones(1)}, ["z"])


def test_the_backend_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of one batch share a run; a bad one among them gets the error, alone."""
    import onnx
    from onnx import TensorProto, helper

    table = helper.make_tensor("table", TensorProto.FLOAT, [3], [10.0, 20.0, 30.0])
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "i"], ["out"])], "g",
        [helper.make_tensor_value_info("i", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n"])], [table],
    )  # fmt: skip
    (tmp_path / "1").mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "1" / "model.onnx")
    served = onnxruntime_backend.TritonPythonModel()
    served.initialize({"model_repository": str(tmp_path), "model_version": "1"})

    def rows(*indices: int) -> Any:
        return asked(i=np.array(indices))

    def values(*answers: Any) -> list[list[float]]:
        return [answer.tensors["out"].tolist() for answer in answers]

    assert values(*served.execute([rows(0, 2), rows(1)])) == [[10.0, 30.0], [20.0]]
    first, bad, last = served.execute([rows(0, 2), rows(7), rows(1, 1)])
    assert values(first, last) == [[10.0, 30.0], [20.0, 20.0]]
    assert bad.error().code == "invalid" and "out of data bounds" in bad.error().message()
    monkeypatch.setattr(served, "session", None)  # a fault of ours
    (broken,) = served.execute([rows(0)])
    assert broken.error().code == "internal" and "NoneType" in broken.error().message()
