"""Model repositories on disk: complete, whole or not at all, and only of what fits together."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import NAMES, tiny_dit, tiny_vae

from dit_engine.checkpoint import save_pretrained
from dit_export import model_repository
from dit_export.bundle import Bundle, Graph, write_manifest
from dit_export.cli import main
from dit_export.directories import new_directory
from dit_export.graphs import GRAPHS as ALL_GRAPHS
from dit_export.graphs import signature
from dit_export.model_repository import MARKER, SOURCES, write_repository
from dit_export.source import weights_hash
from dit_export.triton.configuration import Enum, ServingOptions, to_pbtxt
from dit_export.triton.pipeline import Facts, parse_rows

MODELS = ["dit", "dit_guided_step", "dit_transformer", "vae_decoder"]


def write_bundle(path: Path, vae: bool = True, data: bool = False) -> Bundle:
    """An export whose graphs are no graphs: here only their names and shapes matter."""
    model, decoder = tiny_dit(), tiny_vae() if vae else None
    names = [name for name in ALL_GRAPHS if decoder or name != "vae_decoder"]
    facts: dict[str, Any] = {
        "model": model.config.to_dict(), "vae": decoder and json.loads(decoder.config.to_json()),
        "checkpoint": weights_hash(model), "vae_checkpoint": decoder and weights_hash(decoder),
        "dtype": "fp16", "opset": 23, "target": "onnxruntime", "guided_channels": 3,
        "label_names": list(NAMES),
    }  # fmt: skip
    config = None if decoder is None else decoder.config
    graphs = [Graph(n, f"{n}.onnx", "fp16", *signature(n, model.config, config)) for n in names]
    with new_directory(path) as partial:
        for graph in graphs:
            (partial / graph.file).write_bytes(graph.name.encode())
            if data:
                (partial / f"{graph.file}.data").write_bytes(b"weights")
        write_manifest(partial, facts, graphs)
    return Bundle.open(path)


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
    path = write_repository(bundle, tmp_path / "repository", ServingOptions(max_batch_size=4))
    assert only(tmp_path) == ["onnx", "repository"]
    assert only(path) == sorted([*MODELS, MARKER, "README.md", "client.py"])
    for model, graph in (("dit_transformer", "transformer"), ("vae_decoder", "vae_decoder"),
                         ("dit_guided_step", "guided_step")):  # fmt: skip
        assert only(path / model) == ["1", "config.pbtxt"]
        assert (path / model / "1" / "model.onnx").read_text() == graph
        config = parsed(path, model)
        assert config.name == model and config.max_batch_size == 4
        assert config.platform == "onnxruntime_onnx"
        assert [g.count for g in config.instance_group] == [1]
        assert config.version_policy.latest.num_versions == 1
        assert config.dynamic_batching.max_queue_delay_microseconds == 2000
        assert [w.batch_size for w in config.model_warmup] == [1, 4]
        (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
        assert accelerator.name == "cuda"
        expected = bundle.vae_checkpoint if model == "vae_decoder" else bundle.checkpoint
        assert config.parameters["checkpoint"].string_value == expected
    assert Bundle.open(bundle.path)  # copied, not moved


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
    assert [list(t.dims) for t in (*config.input, *config.output)] == [[4, -1, -1], [3, -1, -1]]
    config = parsed(path, "dit")
    assert config.backend == "python" and list(config.output[0].dims) == [16, 16, 3]
    assert [i.name for i in config.input if not i.optional] == ["seeds"]


def test_accelerators(tmp_path: Path, bundle: Bundle) -> None:
    # The VAE is in float32 beside a transformer in fp16, as `dit-export onnx` leaves it.
    vae = replace(bundle.graphs["vae_decoder"], dtype="fp32")
    bundle = replace(bundle, graphs=bundle.graphs | {"vae_decoder": vae})
    for name, expected in (("none", []), ("tensorrt", ["tensorrt"])):
        path = write_repository(bundle, tmp_path / name, ServingOptions(accelerator=name))
        accelerators = parsed(path, "dit_transformer").optimization.execution_accelerators
        assert [a.name for a in accelerators.gpu_execution_accelerator] == expected
    assert dict(accelerators.gpu_execution_accelerator[0].parameters)["precision_mode"] == "FP16"
    for model, precision in (("dit_guided_step", "FP16"), ("vae_decoder", "FP32")):
        (only,) = parsed(path, model).optimization.execution_accelerators.gpu_execution_accelerator
        assert bundle.dtype == "fp16" and dict(only.parameters)["precision_mode"] == precision


def test_large_weights_keep_their_name(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "onnx", data=True)
    path = write_repository(bundle, tmp_path / "repository")
    assert only(path / "dit_transformer" / "1") == ["model.onnx", "transformer.onnx.data"]


def test_the_servers_loop_is_ours_and_needs_no_torch(tmp_path: Path, bundle: Bundle) -> None:
    path = write_repository(bundle, tmp_path / "repository")
    version = path / "dit" / "1"
    for module in SOURCES:
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None
        copied = version / f"{module.replace('.', '/')}.py"
        assert copied.read_bytes() == Path(spec.origin).read_bytes()
    code = f"""
import sys
sys.path.insert(0, {str(version)!r})
sys.modules["torch"] = None  # importing it raises
import model, numpy, pathlib
from dit_export.triton.pipeline import Facts, parse_rows
from dit_export.triton.sampling import sample
import dit_engine
assert dit_engine.__file__.startswith({str(version)!r})
facts = Facts.read(pathlib.Path({str(version / "pipeline.json")!r}))
column = lambda *v: numpy.array(v)[:, None]
rows = parse_rows({{"label_names": column(b"cat", b"9"), "seeds": column(1, 2)}}, facts)
assert [(r.label, r.steps, r.scale, r.spacing) for r in rows] == [(2, 250, 4.0, "official"),
                                                                   (9, 250, 4.0, "official")]
z = sample(rows[:1], facts.shape, facts.learn_sigma, lambda i: (i["z"] + 1, i["z"]))
print(model.TritonPythonModel.__name__, z.shape)
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "TritonPythonModel (1, 4, 8, 8)\n"


def test_readme_names_the_model(tmp_path: Path, bundle: Bundle) -> None:
    text = (write_repository(bundle, tmp_path / "repository") / "README.md").read_text()
    assert text.startswith("# DiT-2x48/2 on Triton Inference Server")
    assert "ant, bee, cat, dog … (10 in all)" in text and "{" not in text.replace("{name}", "")
    assert 'precision="fp16"' in text and "(N, 16, 16, 3) uint8" in text


def test_what_else_is_there_stays(tmp_path: Path, bundle: Bundle) -> None:
    target = tmp_path / "repository"
    target.mkdir()
    (target / "thesis.tex").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds something else \(thesis\.tex\); nothing was"):
            write_repository(bundle, target, overwrite=overwrite)
    assert only(target) == ["thesis.tex"] and only(tmp_path) == ["onnx", "repository"]


def test_an_earlier_repository_is_replaced_only_on_request(tmp_path: Path, bundle: Bundle) -> None:
    path = write_repository(bundle, tmp_path / "repository")
    with pytest.raises(ValueError, match="holds a model repository; --overwrite replaces it"):
        write_repository(bundle, path, ServingOptions(max_batch_size=2))
    assert parsed(path, "dit").max_batch_size == 16
    write_repository(bundle, path, ServingOptions(max_batch_size=2), overwrite=True)
    assert parsed(path, "dit").max_batch_size == 2


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[Path] = []

    def copy(source: Path, target: Path) -> None:
        copied.append(target)
        if len(copied) == 3:
            raise OSError(28, "No space left on device")
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(model_repository.shutil, "copyfile", copy)
    with pytest.raises(OSError, match="No space left"):
        write_repository(bundle, tmp_path / "repository")
    assert copied[0].parents[2] != tmp_path / "repository" and only(tmp_path) == ["onnx"]


def test_a_model_without_vae(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "onnx", vae=False)
    with pytest.raises(ValueError, match="has no VAE, and a server of images needs one"):
        write_repository(bundle, tmp_path / "repository")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"platform": "openvino"}, "platform 'openvino': choose one of onnxruntime, tensorrt"),
        ({"accelerator": "rocm"}, "accelerator 'rocm': choose one of cuda, tensorrt, none"),
        ({"max_batch_size": 0}, "max_batch_size 0 is not a positive integer"),
        ({"queue_delay_us": -1}, "queue_delay_us -1 is negative"),
    ],
)
def test_options_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServingOptions(**changes).checked()


def test_text_format() -> None:
    text = to_pbtxt({"a": 'qu"ote\\', "b": [{"c": Enum("KIND")}, {"c": True}], "d": [], "e": [1]})
    assert text == 'a: "qu\\"ote\\\\"\nb {\n  c: KIND\n}\nb {\n  c: true\n}\nd: []\ne: [1]\n'


FACTS = Facts((4, 8, 8), True, 10, list(NAMES), {"ddpm": [250, "official"]})


def test_rows_of_a_request() -> None:
    inputs = {"labels": [3, 4], "seeds": [5, 6], "steps": [7, 8], "guidance_scale": [1.0, 2.5]}
    rows = parse_rows({name: np.array(v)[:, None] for name, v in inputs.items()}, FACTS)
    assert [(r.label, r.seed, r.steps, r.scale, r.sampler) for r in rows] == [
        (3, 5, 7, 1.0, "ddpm"), (4, 6, 8, 2.5, "ddpm"),
    ]  # fmt: skip


def command(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error, for exit code 2."""
    assert main(["triton", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_the_command_with_a_finished_export(
    tmp_path: Path, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "repository"
    assert main(["triton", "--onnx", str(bundle.path), "-o", str(target)]) == 0
    assert capsys.readouterr().out.startswith("4 models, ")
    assert only(target) == sorted([*MODELS, MARKER, "README.md", "client.py"])


def test_bad_commands(tmp_path: Path, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    onnx, target = bundle.path, tmp_path / "repository"
    other = tmp_path / "other"
    save_pretrained(other, tiny_dit(seed=1), tiny_vae(), NAMES)
    for arguments, message in (
        ([], "-o is missing"),
        (["-o", target, "--serve", onnx], "--serve and -o: give one of the two"),
        (["-o", target, "--platform", "tensorrt"], "needs --engines and the --onnx"),
        (["-o", target, "--onnx", tmp_path], "no export; manifest.json is missing"),
        (["-o", onnx, "--onnx", onnx], "holds something else"),
        (["-o", target, "--onnx", onnx, "--model", other], "is an export of another model than"),
        (["-o", target, "--onnx", onnx, "--max-batch-size", "0"], "max_batch_size 0 is not"),
        (["-o", target, "--dtype", "fp4"], "dtype 'fp4': choose one of"),
        (["--serve", onnx], "no model repository; repository.json is missing"),
    ):  # fmt: skip
        assert message in command(*arguments, capsys=capsys)
    (onnx / "transformer.onnx").write_bytes(b"Transformer")
    message = command("-o", target, "--onnx", onnx, capsys=capsys)
    assert "transformer.onnx: has changed since the export" in message
    assert only(tmp_path) == ["onnx", "other"]
