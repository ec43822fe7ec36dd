"""The loop on the server, without a server: noise, rows of a request, and answers to requests."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import NAMES, tiny_dit, tiny_engine

from dit_engine.decode import to_uint8 as engine_to_uint8
from dit_engine.engine import Engine
from dit_engine.sampling.diffusion import Diffusion
from dit_engine.sampling.samplers import SAMPLERS
from dit_export.onnx.graphs import GuidedStep
from dit_export.server import onnxruntime_backend, pipeline
from dit_export.server.pipeline import Facts, Failed, TritonPythonModel, parse_rows
from dit_export.server.sampling import Row, sample, to_uint8
from dit_export.server.torch_random import TorchGenerator

SHAPE = (4, 8, 8)


@pytest.mark.parametrize(
    "shape",
    [(1,), (3, 5),  # fewer than 16 numbers are made one by one
     (4, 4), (17,), (31,),  # 16 and more in blocks of 16; the last is drawn anew unless it is whole
     (3, 5, 5), (4, 32, 32)],
)  # fmt: skip
def test_numbers_are_torchs(shape: tuple[int, ...]) -> None:
    """To 2e-7 of each number and 2e-7 on top: torch's vectorised functions round otherwise."""
    for seed in [0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**63 - 1, 100]:
        theirs, ours = torch.Generator().manual_seed(seed), TorchGenerator(seed)
        for _ in range(4):  # one after another: the generators must stay in step
            expected = torch.randn(shape, generator=theirs).numpy()
            actual = ours.randn(shape)
            assert actual.shape == shape and actual.dtype == np.float32
            np.testing.assert_allclose(actual, expected, rtol=2e-7, atol=2e-7)


def test_more_numbers_than_the_generator_holds() -> None:
    """624 words are made at a time."""
    theirs, ours = torch.Generator().manual_seed(5), TorchGenerator(5)
    for size in (600, 30, 7, 5, 10_000):
        expected = torch.randn(size, generator=theirs).numpy()
        np.testing.assert_allclose(ours.randn((size,)), expected, rtol=2e-7, atol=2e-7)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


def torch_step(engine: Engine, sizes: list[int]):
    """What the server's graph computes; sizes: filled with the batches that are asked for."""
    module = GuidedStep(engine.model, guided_channels=3)

    def step(inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        order = ("z", "x0_before", "noise", "t", "y", "guidance_scale", "coefficients")
        assert {inputs[name].dtype for name in ("t", "y")} == {np.dtype(np.int64)}
        sizes.append(len(inputs["z"]))
        unused = inputs["coefficients"][:, 8] == 0
        assert not inputs["noise"][unused].any()  # drawn only where a step adds it
        with torch.inference_mode():
            z, x0 = module(*(torch.from_numpy(inputs[name]) for name in order))
        return z.numpy(), x0.numpy()

    return step


def test_rows_are_the_engines_latents(engine: Engine) -> None:
    """Side by side in one batch, each with its own sampler, steps and guidance."""
    rows = [
        Row(3, 11, 6, 4.0, "ddpm", "official"),
        Row(9, 2**33 + 1, 4, 2.0, "ddim", "official"),
        Row(0, 5, 5, 7.5, "dpm++", "linspace"),
        Row(1, 0, 2, 1.0, "ddpm", "official"),
    ]
    sizes: list[int] = []
    latents, lost = sample(rows, SHAPE, True, torch_step(engine, sizes))
    assert sizes == [4, 4, 3, 3, 2, 1] and lost == {}  # a row leaves when it is through
    for row, z in zip(rows, latents, strict=True):
        expected = engine.generate(
            row.label, seed=row.seed, steps=row.steps, sampler=row.sampler,
            guidance_scale=row.scale, backend="eager", output="latent",
        ).images[0]  # fmt: skip
        error = np.abs(z - expected.numpy()).max() / expected.abs().max()
        assert error < 1e-5, (row, error)


@pytest.mark.parametrize(
    "diffusion",
    [
        {"prediction": "v_prediction", "zero_terminal_snr": True, "num_train_steps": 100},
        {"beta_end": 0.008, "clip": 1.0, "variance": "fixed_small"},
    ],
)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_another_diffusion_than_the_published_one(diffusion: dict[str, Any], sampler: str) -> None:
    """Its betas, prediction and clamping, as the engine's plain samplers have them."""
    made = Diffusion(**diffusion)
    engine = Engine(tiny_dit(diffusion=made), device="cpu")
    row = Row(3, 11, 6, 4.0, sampler, SAMPLERS[sampler].spacing)
    step = torch_step(engine, [])
    ((z,), _) = sample([row], SHAPE, True, step, diffusion=made)
    expected = engine.generate(3, seed=11, steps=6, sampler=sampler, backend="eager").images[0]
    np.testing.assert_allclose(z, expected, rtol=0, atol=1e-5 * expected.abs().max())
    ((other,), _) = sample([row], SHAPE, True, step)
    assert np.abs(other - expected.numpy()).max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize("value", [np.nan, 2e18])  # float32 holds the second, but not its square
def test_a_row_that_is_not_finite_leaves_the_others_alone(engine: Engine, value: float) -> None:
    sizes: list[int] = []
    plain = torch_step(engine, sizes)

    def step(inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        z, x0 = plain(inputs)
        z[(inputs["y"] == 7) & (len(sizes) == 2)] = value  # at its second step
        return z, x0

    rows = [Row(label, label, 4, 4.0, "ddim", "official") for label in (3, 7)]
    latents, lost = sample(rows, SHAPE, True, step)
    assert lost == {1: 1} and sizes == [2, 2, 1, 1]
    ((alone,), _) = sample(rows[:1], SHAPE, True, plain)
    np.testing.assert_allclose(latents[0], alone, rtol=0, atol=1e-5 * np.abs(alone).max())


def test_a_stopped_loop_asks_no_more(engine: Engine) -> None:
    sizes: list[int] = []
    answers = iter([False, False, True])
    rows = [Row(3, 11, 6, 4.0, "ddpm", "official")]
    sample(rows, SHAPE, True, torch_step(engine, sizes), lambda: next(answers))
    assert len(sizes) == 2


def test_pixels_are_the_engines() -> None:
    images = np.linspace(-1.5, 1.5, 2 * 3 * 64 * 64, dtype=np.float32).reshape(2, 3, 64, 64)
    expected = engine_to_uint8(torch.from_numpy(images))
    assert expected.min() == 0 and expected.max() == 255
    np.testing.assert_array_equal(to_uint8(images), expected)


FACTS = Facts(SHAPE, True, 10, list(NAMES), {"ddpm": [250, "official"]})


def test_rows_of_a_request() -> None:
    inputs = {"labels": [3, 4], "seeds": [5, 6], "steps": [7, 8], "guidance_scale": [1.0, 2.5]}
    rows = parse_rows({name: np.array(v)[:, None] for name, v in inputs.items()}, FACTS)
    assert [(r.label, r.seed, r.steps, r.scale, r.sampler) for r in rows] == [
        (3, 5, 7, 1.0, "ddpm"), (4, 6, 8, 2.5, "ddpm"),
    ]  # fmt: skip
    few = replace(FACTS, diffusion=Diffusion(num_train_steps=100))
    asked = {"labels": np.array([3]), "seeds": np.array([5])}
    assert [row.steps for row in parse_rows(asked, few)] == [100]
    with pytest.raises(ValueError, match="steps 101 is out of range: allowed is 1 to 100"):
        parse_rows(asked | {"steps": np.array([101])}, few)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.array(3)}, r"labels has shape \(\); \(N, 1\) is needed"),
        ({"labels": np.zeros((1, 2), np.int64)}, r"labels has shape \(1, 2\); \(N, 1\) is"),
        ({"labels": np.zeros((0, 1), np.int64)}, "labels is empty"),
        ({"labels": np.array([True])}, "labels holds bool; whole numbers are needed"),
        ({"labels": np.array([1.0])}, "labels holds float64; whole numbers are needed"),
        ({"labels": np.array(["3"])}, "labels holds <U1; whole numbers are needed"),
        ({"labels": np.array([10])}, "label 10 is out of range; allowed are 0 to 9"),
        ({"steps": np.array([2.5])}, "steps holds float64; whole numbers are needed"),
        ({"steps": np.array([True])}, "steps holds bool; whole numbers are needed"),
        ({"steps": np.array([5, 5])}, "steps has 2 rows for 1 labels; one each is needed"),
        ({"seeds": np.array([-1])}, "seed -1 is not a whole number from 0 to 9223372036854775807"),
        ({"seeds": np.array([2**63], np.uint64)}, "seed 9223372036854775808 is not"),
        ({"seeds": np.array([True])}, "seeds holds bool; whole numbers are needed"),
        ({"guidance_scale": np.array([np.nan])}, "guidance_scale nan is not a finite number of 0"),
        ({"guidance_scale": np.array([True])}, "guidance_scale holds bool; real numbers are"),
        ({"guidance_scale": np.array([-1.0])}, "guidance_scale -1.0 is not a finite number of 0"),
        ({"sampler": np.array([b"\xff"], object)}, r"sampler: text b'\\xff' is not UTF-8"),
        ({"sampler": np.array([3], object)}, "sampler holds 3; text is needed"),
        ({"sampler": np.array([3])}, "sampler holds int64; texts are needed"),
        ({"sampler": np.array(["euler"])}, "sampler 'euler': choose one of ddpm"),
        ({"label_names": np.array(["bee"])}, "give one of labels .numbers. and label_names"),
        ({"latents": np.zeros((1, 1))}, "input 'latents' is unknown; known are labels, "),
    ],
)
def test_rows_that_are_refused(changes: dict[str, np.ndarray], message: str) -> None:
    good = {"labels": np.array([3]), "seeds": np.array([5])}
    with pytest.raises(ValueError, match=f"^{message}"):
        parse_rows(good | changes, FACTS)


def test_rows_without_labels_or_seeds() -> None:
    for given, message in (("seeds", "give one of labels"), ("labels", "seeds is missing")):
        with pytest.raises(ValueError, match=message):
            parse_rows({given: np.array([3])}, FACTS)


CPU, GPU = 0, 1


@dataclass
class Tensor:
    """A tensor as Triton gives it to Python models."""

    name: str
    value: np.ndarray
    memory: int = CPU

    def as_numpy(self) -> np.ndarray:
        if self.memory == GPU:
            raise RuntimeError("Tensor is stored in GPU and cannot be converted to NumPy")
        return self.value


class ModelException(Exception):
    pass


class Error:
    INVALID_ARG, INTERNAL = "invalid", "internal"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self.message, self.code = lambda: message, code


class Response:
    def __init__(self, output_tensors: Any = (), error: Error | None = None) -> None:
        self.output_tensors, self.error = list(output_tensors), lambda: error
        self.has_error = lambda: error is not None


@dataclass
class Request:
    """To a model that doubles. Without a preferred memory, it answers where it computes."""

    model_name: str
    requested_output_names: list[str]
    inputs: list[Tensor]
    preferred_memory: int = GPU

    def exec(self) -> Response:
        if self.model_name == "absent":
            raise ModelException("it is not loaded")
        if self.model_name == "broken":
            return Response(error=Error("out of memory"))
        return Response(Tensor(t.name, 2 * t.value, self.preferred_memory) for t in self.inputs)


class Asked:
    """A request to "dit", or to the graph of `test_the_backend_in_python`."""

    def __init__(self, **columns: Any) -> None:
        self.columns = {name: np.array(value) for name, value in columns.items()}
        self.is_cancelled, self.requested_output_names = lambda: False, lambda: ["out"]

    def inputs(self) -> list[Any]:
        return [
            SimpleNamespace(name=lambda name=name: name, as_numpy=lambda value=value: value)
            for name, value in self.columns.items()
        ]


@pytest.fixture(autouse=True)
def utilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that Triton gives to Python models."""

    def output(response: Response, name: str) -> Tensor:
        return next(tensor for tensor in response.output_tensors if tensor.name == name)

    module: Any = ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceRequest = Tensor, Request
    module.TritonModelException, module.TritonError = ModelException, Error
    module.TRITONSERVER_MEMORY_CPU, module.InferenceResponse = CPU, Response
    module.PreferredMemory = lambda kind, _device: kind
    module.get_output_tensor_by_name = output
    module.get_input_tensor_by_name = lambda asked, name: Tensor(name, asked.columns[name])
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)


def asked(label: int, **more: Any) -> Asked:
    return Asked(**{"labels": [label], "seeds": [1], "steps": [2], "sampler": [b"ddim"]} | more)


def test_mistakes_of_clients_and_faults_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents of label 7 and pixels of label 8 are not finite; label 9 breaks the model."""

    def infer(model: str, inputs: dict[str, np.ndarray], _: list[str]) -> list[np.ndarray]:
        if model == "vae_decoder":
            return [np.where(inputs["z"] == 8, np.nan, inputs["z"])[:, :3]]
        if 9 in inputs["y"]:
            raise Failed("dit_guided_step: out of memory")
        z = np.broadcast_to(inputs["y"][:, None, None, None], inputs["z"].shape)
        return [np.where(z == 7, np.nan, z).astype(np.float32)] * 2

    monkeypatch.setattr(pipeline, "_infer", infer)
    model = TritonPythonModel()
    model.facts = Facts((4, 4, 4), True, 10, None, {"ddim": [50, "official"]})
    broken = asked(1)
    monkeypatch.setattr(broken, "inputs", lambda: 1 / 0)
    two = Asked(labels=[0, 1], seeds=[1, 1], steps=[2, 2], sampler=[b"ddim"] * 2)
    first, second, *others = model.execute(
        [two, asked(0), asked(10), asked(7), broken, asked(8), asked(1, steps=[0])]
    )
    made = [answer.output_tensors[0].as_numpy() for answer in (first, second)]
    assert [images.shape for images in made] == [(2, 4, 4, 3), (1, 4, 4, 3)]
    assert [image.max() for images in made for image in images] == [128, 255, 128]
    for answer, code, message in zip(
        others,
        ("invalid", "internal", "internal", "internal", "invalid"),
        (
            "label 10 is out of range; allowed are 0 to 9",
            "the latents of image 0 of 1 are not finite, first at step 1 of 2 with guidance",
            "ZeroDivisionError: division by zero",
            "vae_decoder: the pixels of image 0 of 1 are not finite",
            "steps 0 is out of range: allowed is 1 to 1000",
        ),
        strict=True,
    ):
        assert answer.error().code == code and answer.error().message().startswith(message)
    failed = [answer.error().message() for answer in model.execute([asked(9), asked(0)])]
    assert failed == ["dit_guided_step: out of memory"] * 2

    def raises(*_: object) -> Any:
        raise MemoryError("no room\nat all")

    monkeypatch.setattr(pipeline, "_infer", raises)
    (answer,) = model.execute([asked(0)])
    assert answer.error().code == "internal"
    assert answer.error().message() == "the sampling loop: no room at all"


def test_answers_of_models_on_a_gpu_come_to_the_host() -> None:
    z, t = np.ones((2, 4), np.float32), np.arange(2)
    doubled, times = pipeline._infer("doubler", {"z": z, "t": t}, ["z", "t"])
    np.testing.assert_array_equal(doubled, 2 * z)
    np.testing.assert_array_equal(times, [[0], [2]])  # one number per row, (N, 1)
    for model, message in (("absent", "it is not loaded"), ("broken", "out of memory")):
        with pytest.raises(Failed, match=f"^{model}: {message}$"):
            pipeline._infer(model, {"z": np.ones(1)}, ["z"])


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
    arguments = {"model_config": "{}", "model_repository": str(tmp_path), "model_version": "1"}
    served.initialize(arguments)

    def rows(answer: Response) -> list[float]:
        return answer.output_tensors[0].value.tolist()

    good = served.execute([Asked(i=[0, 2]), Asked(i=[1])])
    assert [rows(answer) for answer in good] == [[10.0, 30.0], [20.0]]
    first, bad, last = served.execute([Asked(i=[0]), Asked(i=[7]), Asked(i=[1, 1])])
    assert (rows(first), rows(last)) == ([10.0], [20.0, 20.0])
    assert bad.error().code == "invalid" and "out of data bounds" in bad.error().message()
    monkeypatch.setattr(served, "session", None)  # a fault of ours
    (broken,) = served.execute([Asked(i=[0])])
    assert broken.error().code == "internal" and "NoneType" in broken.error().message()
