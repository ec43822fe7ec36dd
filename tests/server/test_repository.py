"""Model repositories on disk: complete, whole or not at all, and only of what fits together."""

from __future__ import annotations

import json
import re
import subprocess
import sys
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
from dit_export.server.pipeline import Facts
from dit_export.server.repository import MARKER, write_repository
from dit_export.server.sources import LOOP, source_of
from dit_export.tensorrt.build import graph_hash
from dit_export.tensorrt.engine_files import EngineFile, EngineKey, write_engine
from dit_export.tensorrt.profiles import Profile, Range

FILES = sorted([*GRAPHS, "dit", MARKER, "README.md", "client.py"])


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "onnx")


def export(tmp_path: Path, vae_dtype: str | None = None, **changes: Any) -> Bundle:
    """As `write_bundle`, with another number format for the VAE, as `dit-export onnx` allows."""
    inside = {"vae_decoder": {"dtype": vae_dtype}} if vae_dtype else {}
    bundle = write_bundle(tmp_path / "onnx", **({"graphs": inside} | changes))
    if vae_dtype is None:
        return bundle
    vae = replace(bundle.graphs["vae_decoder"], dtype=vae_dtype)
    return replace(bundle, graphs=bundle.graphs | {"vae_decoder": vae})


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
        assert config.version_policy.latest.num_versions == 1
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
    assert Bundle.open(bundle.path)  # copied, not moved
    text = (path / "README.md").read_text()
    assert text.startswith("# DiT-2x48/2 on Triton Inference Server")
    assert "ant, bee, cat, dog … (10 in all)" in text and "most 4 images" in text
    assert 'precision="fp16"' in text and "(N, 16, 16, 3) uint8" in text


def test_shapes_without_the_batch(tmp_path: Path, bundle: Bundle) -> None:
    path = write_repository(bundle, tmp_path / "repository")
    config = parsed(path, "dit_guided_step")
    shapes = {i.name: (list(i.dims), i.HasField("reshape")) for i in config.input}
    latent = ([4, 8, 8], False)
    assert shapes == {
        "z": latent, "x0_before": latent, "noise": latent, "t": ([1], True), "y": ([1], True),
        "guidance_scale": ([1], True), "coefficients": ([9], False),
    }  # fmt: skip
    assert [list(i.reshape.shape) for i in config.input if i.HasField("reshape")] == [[]] * 3
    (warm, _) = config.model_warmup
    assert {name: list(w.dims) for name, w in warm.inputs.items()} == {
        name: dims for name, (dims, _) in shapes.items()
    }
    config = parsed(path, "vae_decoder")
    assert [list(t.dims) for t in (*config.input, *config.output)] == [[4, 8, 8], [3, 16, 16]]
    config = parsed(path, "dit")
    assert config.backend == "python" and list(config.output[0].dims) == [16, 16, 3]
    assert [i.name for i in config.input if not i.optional] == ["seeds"]


def test_accelerators(tmp_path: Path) -> None:
    bundle = export(tmp_path, "fp32", data=True)  # the transformer is in fp16
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


def test_the_servers_loop_is_ours_and_needs_no_torch(tmp_path: Path) -> None:
    diffusion = Diffusion(num_train_steps=100, prediction="v_prediction", clip=2.0)
    bundle = write_bundle(tmp_path / "onnx", model=tiny_dit(diffusion=diffusion))
    path = write_repository(bundle, tmp_path / "repository")
    version = path / "dit" / "1"
    assert Facts.read(version / "pipeline.json").diffusion == diffusion
    for module in LOOP:
        copied = version / f"{module.replace('.', '/')}.py"
        assert copied.read_text(encoding="utf-8") == source_of(module)
    code = f"""
import sys
sys.path.insert(0, {str(version)!r})
sys.modules["torch"] = None  # importing it raises
import model, numpy, pathlib
from dit_export.server.pipeline import Facts, parse_rows
from dit_export.server.sampling import sample
import dit_engine
assert dit_engine.__file__.startswith({str(version)!r})
facts = Facts.read(pathlib.Path({str(version / "pipeline.json")!r}))
column = lambda *v: numpy.array(v)[:, None]
rows = parse_rows({{"label_names": column(b"cat", b"9"), "seeds": column(1, 2)}}, facts)
assert [(r.label, r.steps, r.scale, r.spacing) for r in rows] == [(2, 100, 4.0, "official"),
                                                                   (9, 100, 4.0, "official")]
z, _ = sample(rows[:1], facts.shape, facts.learn_sigma, lambda i: (i["z"] + 1, i["z"]))
print(model.TritonPythonModel.__name__, z.shape)
"""
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "TritonPythonModel (1, 4, 8, 8)\n"), done.stderr
    text = (path / "README.md").read_text()
    assert "| optional, 1 to 100; the sampler's usual number by default |" in text


def test_what_may_be_replaced(tmp_path: Path, bundle: Bundle) -> None:
    path = write_repository(bundle, tmp_path / "repository")
    with pytest.raises(ValueError, match="holds a model repository; --overwrite replaces it"):
        write_repository(bundle, path, ServingOptions(max_batch_size=2))
    assert parsed(path, "dit").max_batch_size == 16
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
    (path / MARKER).write_text(json.dumps(marker | {"files": 5}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years")
    for target in (path, tmp_path / "other"):
        before = only(target)
        with pytest.raises(ValueError, match=r"holds something else \((README|thesis).*; nothing"):
            write_repository(bundle, target, overwrite=True)
        assert only(target) == before


# Changes of `write_bundle` → the message. A graph of another export is listed with its own SHA-256,
# so only what the graph says about itself gives it away.
UNFIT: list[tuple[dict[str, Any], str]] = [
    ({"vae": False}, "has no VAE, and a server of images needs one"),
    ({"dtype": "bf16"}, "^bf16 graphs are not served: .* fp32, fp16, int8, fp8,"),
    ({"vae_dtype": "bf16"}, "^bf16 graphs are not served: "),
    *(({"graphs": {graph: {key: said}}},
       rf"{graph}\.onnx: comes from another export: its {key} is '{said}', where the manifest has")
      for graph, key, said in (
          ("guided_step", "checkpoint", "abc"), ("guided_step", "graph", "transformer"),
          ("transformer", "dtype", "fp32"), ("vae_decoder", "checkpoint", "abc"))),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), UNFIT)
def test_exports_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    bundle = export(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        write_repository(bundle, tmp_path / "repository")
    assert only(tmp_path) == ["onnx"]


def write_engines(directory: Path, bundle: Bundle, **changes: Any) -> None:
    """Files that are not engines: here only what is written beside them matters."""
    for graph in GRAPHS.values():
        profiles = (Profile(Range(1, 4, 8)),)
        key = EngineKey(graph_hash(bundle, graph), "tensorrt", "10.9", "any", profiles)
        checkpoint = bundle.vae_checkpoint if graph == "vae_decoder" else bundle.checkpoint
        key = replace(key, **changes)
        path = directory / f"{graph}-{key.digest}.engine"
        engine = EngineFile(path, graph, checkpoint or "", "fp16", key)
        write_engine(engine, f"engine of {graph}".encode())


def write_plans(tmp_path: Path, bundle: Bundle) -> Path:
    options = ServingOptions(platform="tensorrt", max_batch_size=4)
    target = tmp_path / "repository"
    return write_repository(bundle, target, options, engines=tmp_path / "engines")


def test_engines_become_plans(tmp_path: Path, bundle: Bundle) -> None:
    write_engines(tmp_path / "engines", bundle)
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
        ({"flavour": "rtx"}, "is for rtx; the server loads standard TensorRT's"),
        ({"graph": "abc"}, "was built from another export than"),
        ({"profiles": (Profile(Range(1, 1, 2)),)}, "batches of 1 to 2 .*; 1 to 4 are needed"),
        ({"profiles": (Profile(Range(2, 4, 8)),)}, "batches of 2 to 8 .*; 1 to 4 are needed"),
        ({"profiles": (Profile(Range(1, 4, 8), Range(32, 64, 96)),)},
         r"takes latents of size 32 to 96 .*; 8 is needed"),
        (None, "has changed since it was built"),
    ],
)  # fmt: skip
def test_engines_that_do_not_fit(
    tmp_path: Path, bundle: Bundle, changes: dict[str, Any] | None, message: str
) -> None:
    write_engines(tmp_path / "engines", bundle, **(changes or {}))
    for engine in (tmp_path / "engines").glob("*.engine") if changes is None else ():
        engine.write_bytes(b"another")
    with pytest.raises(ValueError, match=message):
        write_plans(tmp_path, bundle)
    assert only(tmp_path) == ["engines", "onnx"]


def test_bad_commands(tmp_path: Path, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    onnx, target = bundle.path, tmp_path / "repository"
    engines = ["-o", target, "--platform", "tensorrt", "--engines", tmp_path / "empty"]
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([], "-o is missing"),
        (["-o", target, "--serve", onnx], "--output is not for --serve"),
        (["--dtype", "fp16", "--serve", onnx], "--dtype is not for --serve"),
        (["--serve", onnx, "--ready-timeout", "0"], "--ready-timeout 0.0: seconds above 0"),
        (["--serve", onnx], "not a model repository; repository.json is missing"),
        (["-o", target, "--verbose"], "--verbose is an option of --serve, which is not given"),
        (["-o", target, "--http-port", "8000"], "--http-port is an option of --serve, which is"),
        (["-o", target, "--platform", "tensorrt"], "needs --engines and the --onnx"),
        ([*engines, "--onnx", onnx, "--accelerator", "cuda"], "--accelerator is for --platform on"),
        ([*engines, "--onnx", onnx], "holds no engine of transformer"),
        (["-o", target, "--onnx", onnx, "--engines", onnx], "--engines are for --platform tens"),
        (["-o", target, "--onnx", tmp_path], "not an export; manifest.json is missing"),
        (["-o", onnx, "--onnx", onnx], "holds something else"),
        (["-o", target, "--onnx", onnx, "--max-batch-size", "0"], "max_batch_size 0 is not"),
        (["-o", target, "--platform", "openvino"], "openvino': choose one of onnxruntime, tens"),
        (["-o", target, "--dtype", "fp4"], "dtype 'fp4': choose one of"),
        (["-o", target, "--dtype", "int8", "--accelerator", "tensorrt"],
         "accelerator 'tensorrt': onnxruntime's does not take int8 graphs; choose cuda or none"),
        (["-o", target, "--dtype", "bf16"], "bf16 graphs are not served: .*fp32, fp16, int8, fp8"),
    ):  # fmt: skip
        assert main(["triton", *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and re.search(message, said), said
    content = bytearray((onnx / "transformer.onnx").read_bytes())
    content[-1] ^= 1
    (onnx / "transformer.onnx").write_bytes(content)
    assert main(["triton", "-o", str(target), "--onnx", str(onnx)]) == 2
    assert "transformer.onnx: has changed since the export" in capsys.readouterr().err
    assert only(tmp_path) == ["empty", "onnx"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export "onnx"."""
    folder = tmp_path_factory.mktemp("models")
    write_bundle(folder / "onnx")
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--dtype fp32", "--dtype fp32: the export onnx has fp16"),
        ("--opset 21", "--opset 21: the export onnx has 23"),
        ("--guidance-channels 4", "--guidance-channels 4: the export onnx has 3"),
        ("--numerics diffusers", "--numerics diffusers: the export onnx has official"),
        ("--num-heads 4", "--num-heads 4: the export onnx has 2"),
        ("--vae same", "--vae is not for --onnx, which names a finished export"),
        ("--model same", "--model is not for --onnx, which names a finished export"),
        ("--dtype fp16 --opset 23 --numerics official --num-heads 2", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["triton", "tensorrt"])
def test_options_that_say_what_the_export_is(
    name: str, options: str, message: str | None, models: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if name == "tensorrt":
        pytest.importorskip("tensorrt_rtx")
        if message is None or "opset" in options or "guidance" in options:
            return  # it would build engines, or has no such option
    monkeypatch.chdir(models)
    out = tmp_path / "out"
    arguments = [name, "--onnx", "onnx", "-o", str(out), *options.split()]
    assert main(arguments) == (0 if message is None else 2)
    told = capsys.readouterr()
    if message is None:
        assert told.out.startswith("4 models, ") and only(out) == FILES
    else:
        assert told.err.startswith(f"error: {message}") and told.err.count("\n") == 1
        assert not out.exists()
