"""Model repositories on disk: complete, whole or not at all, and only of what fits together."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from bundles import write_bundle
from tiny import tiny_dit

from dit_engine.sampling.diffusion import Diffusion
from dit_export.bundle import Bundle
from dit_export.cli import main
from dit_export.server.configuration import GRAPHS, ServingOptions
from dit_export.server.pipeline import TritonPythonModel
from dit_export.server.repository import MARKER, write_repository
from dit_export.tensorrt.build import graph_hash
from dit_export.tensorrt.engine_files import EngineFile, EngineKey, write_engine
from dit_export.tensorrt.profiles import Profile, Range

FILES = sorted([*GRAPHS, "dit", MARKER, "README.md", "client.py"])


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "onnx")


def parsed(repository: Path, model: str) -> Any:
    """config.pbtxt, read as the server reads it."""
    message = import_module("tritonclient.grpc.model_config_pb2").ModelConfig()
    text = (repository / model / "config.pbtxt").read_text(encoding="utf-8")
    return import_module("google.protobuf.text_format").Parse(text, message)


def only(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_a_complete_repository(tmp_path: Path, bundle: Bundle) -> None:
    numbers = {"instances": 2, "pipelines": 3, "queue_delay_us": 700, "queue_size": 9}
    options = ServingOptions(max_batch_size=4, **numbers)
    path = write_repository(bundle, tmp_path / "repository", options)
    assert only(tmp_path) == ["onnx", "repository"] and only(path) == FILES
    for model, graph in GRAPHS.items():
        assert only(path / model) == ["1", "config.pbtxt"]
        written = path / model / "1" / "model.onnx"
        assert written.read_bytes() == bundle.file(graph).read_bytes()
        config = parsed(path, model)
        assert config.name == model and config.max_batch_size == 4
        assert config.platform == "onnxruntime_onnx"
        assert [g.count for g in config.instance_group] == [2]
        assert config.dynamic_batching.max_queue_delay_microseconds == 700
        assert [w.batch_size for w in config.model_warmup] == [1, 4]
        (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
        assert accelerator.name == "cuda"
        expected = bundle.vae_checkpoint if model == "vae_decoder" else bundle.checkpoint
        assert config.parameters["checkpoint"].string_value == expected
    config = parsed(path, "dit")
    assert [g.count for g in config.instance_group] == [3] and config.max_batch_size == 4
    assert config.dynamic_batching.max_queue_delay_microseconds == 3500
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 9
    assert config.backend == "python" and list(config.output[0].dims) == [16, 16, 3]
    assert [i.name for i in config.input if not i.optional] == ["seeds"]
    assert Bundle.open(bundle.path)  # copied, not moved
    text = (path / "README.md").read_text()
    for fact in ("# DiT-2x48/2 on Triton Inference Server", "ant, bee, cat, dog … (10 in all)",
                 "most 4 images", 'precision="fp16"', "(N, 16, 16, 3) uint8"):  # fmt: skip
        assert fact in text
    config = parsed(path, "dit_guided_step")
    shapes = {i.name: (list(i.dims), i.HasField("reshape")) for i in config.input}
    latent, number = ([4, 8, 8], False), ([1], True)
    assert shapes == {
        "z": latent, "x0_before": latent, "noise": latent, "t": number, "y": number,
        "guidance_scale": number, "coefficients": ([9], False),
    }  # fmt: skip
    (warm, _) = config.model_warmup
    assert {name: list(w.dims) for name, w in warm.inputs.items()} == {
        name: dims for name, (dims, _) in shapes.items()
    }
    config = parsed(path, "vae_decoder")
    assert [list(t.dims) for t in (*config.input, *config.output)] == [[4, 8, 8], [3, 16, 16]]


def test_accelerators(tmp_path: Path) -> None:
    bundle = write_bundle(
        tmp_path / "onnx", data=True, graphs={"vae_decoder": {"dtype": "fp32"}}
    )  # the transformer is in fp16
    vae = replace(bundle.graphs["vae_decoder"], dtype="fp32")
    bundle = replace(bundle, graphs=bundle.graphs | {"vae_decoder": vae})
    for name, expected in (("none", {}), ("tensorrt", {"dit_transformer": "FP16",
                           "dit_guided_step": "FP16", "vae_decoder": "FP32"})):  # fmt: skip
        path = write_repository(bundle, tmp_path / name, ServingOptions(accelerator=name))
        found = {}
        for model in GRAPHS:
            execution = parsed(path, model).optimization.execution_accelerators
            for each in execution.gpu_execution_accelerator:
                assert each.name == "tensorrt"
                found[model] = dict(each.parameters)["precision_mode"]
        assert found == expected
    # Graphs name their files of weights, so these keep their names.
    assert only(path / "dit_transformer" / "1") == ["model.onnx", "transformer.onnx.data"]


def test_the_servers_loop_has_the_models_diffusion(tmp_path: Path) -> None:
    diffusion = Diffusion(num_train_steps=100, prediction="v_prediction", clip=2.0)
    bundle = write_bundle(tmp_path / "onnx", model=tiny_dit(diffusion=diffusion))
    path = write_repository(bundle, tmp_path / "repository")
    model = TritonPythonModel()
    model.initialize({"model_repository": str(path / "dit"), "model_version": "1"})
    assert model.facts.diffusion == diffusion and model.facts.shape == (4, 8, 8)


def test_what_may_be_replaced(tmp_path: Path, bundle: Bundle) -> None:
    path = write_repository(bundle, tmp_path / "repository")
    with pytest.raises(ValueError, match="holds a model repository; --overwrite replaces it"):
        write_repository(bundle, path, ServingOptions(max_batch_size=2))
    write_repository(bundle, path, ServingOptions(max_batch_size=2), overwrite=True)
    assert parsed(path, "dit").max_batch_size == 2
    marker = json.loads((path / MARKER).read_text())
    old = "dit/1/dit_export/triton/pipeline.py"  # where an earlier release had that module
    (path / old).parent.mkdir()
    (path / old).write_text("the loop")
    listed = marker["files"] | {old: sha256(b"the loop").hexdigest()}
    (path / MARKER).write_text(json.dumps(marker | {"files": listed}))
    write_repository(bundle, path, overwrite=True)
    assert not (path / old).parent.exists() and only(path) == FILES
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match=r"holds something else \(thesis.*; nothing"):
        write_repository(bundle, tmp_path / "other", overwrite=True)


# Changes of `write_bundle` → the message. A graph of another export is listed with its own SHA-256,
# so only what the graph says about itself gives it away.
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": False}, "has no VAE, and a server of images needs one"),
        ({"dtype": "bf16"}, "^bf16 graphs are not served .* fp32, fp16, int8, fp8,"),
        ({"graphs": {"guided_step": {"checkpoint": "abc"}}}, "comes from another export: its chec"),
    ],
)
def test_exports_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    bundle = write_bundle(tmp_path / "onnx", **changes)
    with pytest.raises(ValueError, match=message):
        write_repository(bundle, tmp_path / "repository")
    assert only(tmp_path) == ["onnx"]


def write_plans(tmp_path: Path, bundle: Bundle, **changes: Any) -> Path:
    """A repository of files that are not engines: what is written beside them matters. changes: to
    their keys; content: what they hold later."""
    content = changes.pop("content", None)
    for graph in GRAPHS.values():
        profiles = (Profile(Range(1, 4, 8)),)
        key = EngineKey(graph_hash(bundle, graph), "tensorrt", "10.9", "any", profiles)
        key = replace(key, **changes)
        checkpoint = bundle.vae_checkpoint if graph == "vae_decoder" else bundle.checkpoint
        path = tmp_path / "engines" / f"{graph}-{key.digest}.engine"
        engine = EngineFile(path, graph, checkpoint or "", "fp16", key)
        write_engine(engine, f"engine of {graph}".encode())
        if content is not None:
            path.write_bytes(content)
    options = ServingOptions(platform="tensorrt", max_batch_size=4)
    target = tmp_path / "repository"
    return write_repository(bundle, target, options, engines=tmp_path / "engines")


def test_engines_become_plans(tmp_path: Path, bundle: Bundle) -> None:
    path = write_plans(tmp_path, bundle)
    for model, graph in GRAPHS.items():
        assert only(path / model / "1") == ["model.plan"]
        assert (path / model / "1" / "model.plan").read_text() == f"engine of {graph}"
        config = parsed(path, model)
        assert config.platform == "tensorrt_plan" and config.optimization.cuda.graphs
        assert not config.optimization.HasField("execution_accelerators")
    text = (path / "README.md").read_text()
    assert "TensorRT engines, fp16" in text and "the TensorRT version that built them" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flavour": "rtx"}, "for rtx, .*; the server needs"),
        ({"graph": "abc"}, "was built from another export"),
        ({"profiles": (Profile(Range(1, 1, 2)),)}, "batches of 1 to 4"),
        ({"profiles": (Profile(Range(2, 4, 8)),)}, "batches of 1 to 4"),
        ({"profiles": (Profile(Range(1, 4, 8), Range(32, 64, 96)),)}, "latents of size 8"),
        ({"content": b"another"}, "has changed since it was built"),
    ],
)
def test_engines_that_do_not_fit(
    tmp_path: Path, bundle: Bundle, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_plans(tmp_path, bundle, **changes)
    assert only(tmp_path) == ["engines", "onnx"]


def test_bad_commands(tmp_path: Path, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    onnx, target = bundle.path, tmp_path / "repository"
    engines = ["-o", target, "--platform", "tensorrt", "--engines", tmp_path / "empty"]
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([], "-o is missing"),
        (["--dtype", "fp16", "--serve", onnx], "--dtype is not for --serve"),
        (["--serve", onnx, "--ready-timeout", "0"], "--ready-timeout 0.0: seconds above 0"),
        (["--serve", onnx], "not a model repository; repository.json is missing"),
        (["-o", target, "--http-port", "8000"], "--http-port is an option of --serve, which is"),
        (["-o", target, "--platform", "tensorrt"], "needs --engines and the --onnx"),
        ([*engines, "--onnx", onnx, "--accelerator", "cuda"], "--accelerator is for --platform on"),
        ([*engines, "--onnx", onnx], "holds no engine of transformer"),
        (["-o", target, "--onnx", onnx, "--engines", onnx], "--engines are for --platform tens"),
        (["-o", onnx, "--onnx", onnx], "holds something else"),
        (["-o", target, "--onnx", onnx, "--max-batch-size", "0"], "max_batch_size 0 is not"),
        (["-o", target, "--platform", "openvino"], "openvino': choose one of onnxruntime, tens"),
        (["-o", target, "--dtype", "int8", "--accelerator", "tensorrt"],
         "int8 graphs are not served .* 'tensorrt': choose one of fp32, fp16, or"),
    ):  # fmt: skip
        assert main(["triton", *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and re.search(message, said), said
    assert only(tmp_path) == ["empty", "onnx"]


def test_options_that_say_what_the_export_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(tmp_path / "onnx")
    monkeypatch.chdir(tmp_path)
    arguments = ["triton", "--onnx", "onnx", "-o", "out"]
    for options, message in (
        ("--dtype fp32", "--dtype fp32: the export onnx has fp16"),
        ("--num-heads 4", "--num-heads 4: the export onnx has 2"),
        ("--prediction sample", "--prediction sample: the export onnx has epsilon"),
        ("--vae same", "--vae is not for --onnx, which names a finished export"),
        ("--model same", "--model is not for --onnx, which names a finished export"),
    ):
        assert main([*arguments, *options.split()]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"error: {message}") and told.count("\n") == 1
    options = "--dtype fp16 --opset 23 --numerics official --num-heads 2"
    assert main([*arguments, *options.split()]) == 0
    assert capsys.readouterr().out.startswith("4 models, ") and only(Path("out")) == FILES
