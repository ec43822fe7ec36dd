"""Model repositories on disk: complete, whole or not at all, and only of what fits together."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import write_bundle
from tiny import NAMES, tiny_dit, tiny_vae

from dit_engine.checkpoint import save_pretrained
from dit_engine.sampling.coefficients import step_coefficients
from dit_engine.sampling.diffusion import Diffusion
from dit_engine.sampling.schedule import make_schedule
from dit_export.bundle import Bundle
from dit_export.cli import main
from dit_export.onnx.graphs import GuidedStep
from dit_export.server import repository as model_repository
from dit_export.server.configuration import Enum, ServingOptions, to_pbtxt
from dit_export.server.pipeline import Facts, parse_rows
from dit_export.server.repository import MARKER, write_repository
from dit_export.server.sources import LOOP

MODELS = ["dit", "dit_guided_step", "dit_transformer", "vae_decoder"]


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
        written = path / model / "1" / "model.onnx"
        assert written.read_bytes() == bundle.file(graph).read_bytes()
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
    assert [list(t.dims) for t in (*config.input, *config.output)] == [[4, 8, 8], [3, 16, 16]]
    config = parsed(path, "dit")
    assert config.backend == "python" and list(config.output[0].dims) == [16, 16, 3]
    assert [i.name for i in config.input if not i.optional] == ["seeds"]


def test_accelerators(tmp_path: Path) -> None:
    # The VAE is in float32 beside a transformer in fp16, as `dit-export onnx` leaves it.
    bundle = write_bundle(tmp_path / "onnx", graphs={"vae_decoder": {"dtype": "fp32"}})
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
    for module in LOOP:
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None
        copied = version / f"{module.replace('.', '/')}.py"
        assert copied.read_bytes() == Path(spec.origin).read_bytes()
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
assert [(r.label, r.steps, r.scale, r.spacing) for r in rows] == [(2, 250, 4.0, "official"),
                                                                   (9, 250, 4.0, "official")]
z, _ = sample(rows[:1], facts.shape, facts.learn_sigma, lambda i: (i["z"] + 1, i["z"]))
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
        ({"queue_delay_us": -1}, "queue_delay_us -1 is not a whole number"),
    ],
)
def test_options_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServingOptions(**changes).checked()


def test_text_format() -> None:
    text = to_pbtxt({"a": 'qu"ote\\', "b": [{"c": Enum("KIND")}, {"c": True}], "d": [], "e": [1]})
    assert text == 'a: "qu\\"ote\\\\"\nb {\n  c: KIND\n}\nb {\n  c: true\n}\nd: []\ne: [1]\n'


FACTS = Facts((4, 8, 8), True, 10, list(NAMES), {"ddpm": [250, "official"]})


def test_the_pipelines_file_tells_the_diffusion(tmp_path: Path) -> None:
    for i, diffusion in enumerate((Diffusion(), Diffusion(prediction="sample", clip=2.0))):
        bundle = write_bundle(tmp_path / f"onnx{i}", model=tiny_dit(diffusion=diffusion))
        path = write_repository(bundle, tmp_path / f"repository{i}")
        assert Facts.read(path / "dit" / "1" / "pipeline.json").diffusion == diffusion


def test_rows_of_a_request() -> None:
    inputs = {"labels": [3, 4], "seeds": [5, 6], "steps": [7, 8], "guidance_scale": [1.0, 2.5]}
    rows = parse_rows({name: np.array(v)[:, None] for name, v in inputs.items()}, FACTS)
    assert [(r.label, r.seed, r.steps, r.scale, r.sampler) for r in rows] == [
        (3, 5, 7, 1.0, "ddpm"), (4, 6, 8, 2.5, "ddpm"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.array(3)}, r"labels has shape \(\); \(N, 1\) is needed, one row per image"),
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
        (
            {"guidance_scale": np.array([np.nan])},
            "guidance_scale nan is not a finite number",
        ),
        ({"guidance_scale": np.array([True])}, "guidance_scale holds bool; real numbers are"),
        ({"guidance_scale": np.array([-1.0])}, "guidance_scale -1.0 is not a finite number"),
        ({"sampler": np.array([b"\xff"], object)}, r"sampler: text b'\\xff' is not UTF-8"),
        ({"sampler": np.array([3], object)}, "sampler holds 3; text is needed"),
        ({"sampler": np.array([3])}, "sampler holds int64; texts are needed"),
        ({"latents": np.zeros((1, 1))}, "input 'latents' is unknown; known are labels, "),
    ],
)
def test_rows_that_are_refused(changes: dict[str, np.ndarray], message: str) -> None:
    good = {"labels": np.array([3]), "seeds": np.array([5])}
    with pytest.raises(ValueError, match=f"^{message}"):
        parse_rows(good | changes, FACTS)


def test_a_diffusion_of_few_steps() -> None:
    """Its own number of steps is the limit, also of what is taken unasked."""
    few = replace(FACTS, diffusion=Diffusion(num_train_steps=100))
    asked = {"labels": np.array([3]), "seeds": np.array([5])}
    assert [row.steps for row in parse_rows(asked, few)] == [100]
    with pytest.raises(ValueError, match="steps 101 is out of range: allowed is 1 to 100"):
        parse_rows(asked | {"steps": np.array([101])}, few)


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


def test_a_repository_whose_list_of_files_is_none(
    tmp_path: Path, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    target = write_repository(bundle, tmp_path / "repository")
    marker = json.loads((target / MARKER).read_text())
    (target / MARKER).write_text(json.dumps(marker | {"files": 5}))
    arguments = ("--onnx", bundle.path, "-o", target, "--overwrite")
    assert "holds something else (README.md, client.py" in command(*arguments, capsys=capsys)
    assert (target / "dit").is_dir()


def test_bad_commands(tmp_path: Path, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    onnx, target = bundle.path, tmp_path / "repository"
    for arguments, message in (
        ([], "-o is missing"),
        (["-o", target, "--serve", onnx], "--output is not for --serve"),
        (["--dtype", "fp16", "--serve", onnx], "--dtype is not for --serve"),
        (["--serve", onnx, "--ready-timeout", "0"], "--ready-timeout 0.0: seconds above 0"),
        (["--serve", onnx, "--http-port", "65536"], "not a model repository"),
        (["-o", target, "--http-port", "8000"], "--http-port is an option of --serve, which is"),
        (["-o", target, "--platform", "tensorrt"], "needs --engines and the --onnx"),
        (["-o", target, "--platform", "tensorrt", "--engines", onnx, "--onnx", onnx,
          "--accelerator", "cuda"], "--accelerator is for --platform onnxruntime"),
        (["-o", target, "--onnx", onnx, "--engines", onnx], "--engines are for --platform tens"),
        (["-o", target, "--onnx", tmp_path], "not an export; manifest.json is missing"),
        (["-o", onnx, "--onnx", onnx], "holds something else"),
        (["-o", target, "--onnx", onnx, "--max-batch-size", "0"], "max_batch_size 0 is not"),
        (["-o", target, "--dtype", "fp4"], "dtype 'fp4': choose one of"),
        (["-o", target, "--dtype", "int8", "--accelerator", "tensorrt"],
         "accelerator 'tensorrt': onnxruntime's does not take int8 graphs; choose cuda or none"),
        (["-o", target, "--dtype", "bf16"], "bf16 graphs are not served: .*fp32, fp16, int8, fp8"),
        (["--serve", onnx], "not a model repository; repository.json is missing"),
    ):  # fmt: skip
        assert re.search(message, command(*arguments, capsys=capsys))
    content = bytearray((onnx / "transformer.onnx").read_bytes())
    content[-1] ^= 1
    (onnx / "transformer.onnx").write_bytes(content)
    message = command("-o", target, "--onnx", onnx, capsys=capsys)
    assert "transformer.onnx: has changed since the export" in message
    assert only(tmp_path) == ["onnx"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "fp32"], "--dtype fp32: the export {onnx} has fp16"),
        (["--opset", "21"], "--opset 21: the export {onnx} has 23"),
        (["--guidance-channels", "4"], "--guidance-channels 4: the export {onnx} has 3"),
        (["--numerics", "diffusers"], "--numerics diffusers: the export {onnx} has official"),
        (["--num-heads", "4"], "--num-heads 4: the export {onnx} has 2"),
        (["--vae", "same"], "--vae beside --onnx needs --model, with which"),
        (["--model", "other"], "{onnx}: is an export of another model than --model other"),
        (["--model", "wide"],
         "{onnx}: is an export of --model wide with numerics 'official' and not 'diffusers'"),
        (["--model", "renamed"],
         "{onnx}: is an export of --model renamed with label 3 'dog' and not 'wolf'"),
        (["--model", "nameless"],
         "{onnx}: is an export of --model nameless with other label names"),
        (["--model", "another-vae"], "{onnx}: is an export with another VAE than that of --model"),
        (["--model", "same", "--vae", "another-vae/vae"],
         "{onnx}: is an export with another VAE than that of --vae another-vae/vae"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["triton", "tensorrt"])
def test_options_that_contradict_the_export(
    name: str, options: list[str], message: str, tmp_path: Path, bundle: Bundle,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if name == "tensorrt":
        pytest.importorskip("tensorrt_rtx")
        if options[0] in ("--opset", "--guidance-channels"):
            return  # which are no options of this command
    monkeypatch.chdir(tmp_path)
    save_pretrained(tmp_path / "same", tiny_dit(), tiny_vae(), NAMES)
    save_pretrained(tmp_path / "other", tiny_dit(seed=1), tiny_vae(), NAMES)
    save_pretrained(tmp_path / "wide", tiny_dit(numerics="diffusers"), tiny_vae(), NAMES)
    names = [name.replace("dog", "wolf") for name in NAMES]
    save_pretrained(tmp_path / "renamed", tiny_dit(), tiny_vae(), names)
    save_pretrained(tmp_path / "nameless", tiny_dit(), tiny_vae())
    save_pretrained(tmp_path / "another-vae", tiny_dit(), tiny_vae(seed=1), NAMES)
    arguments = [name, "--onnx", str(bundle.path), "-o", "out", *options]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message.format(onnx=bundle.path)}") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_options_that_say_what_the_export_is(tmp_path: Path, bundle: Bundle) -> None:
    save_pretrained(tmp_path / "same", tiny_dit(), tiny_vae(), NAMES)
    options = ["--model", tmp_path / "same", "--dtype", "fp16", "--opset", "23", "--numerics",
               "official", "--vae", tmp_path / "same" / "vae", "--num-heads", "2"]  # fmt: skip
    arguments = ["triton", "--onnx", bundle.path, "-o", tmp_path / "out", *options]
    assert main([str(word) for word in arguments]) == 0
    assert only(tmp_path / "out") == sorted([*MODELS, MARKER, "README.md", "client.py"])


def test_bf16_graphs_are_not_served_by_onnxruntime(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "onnx", dtype="bf16")
    with pytest.raises(ValueError, match=r"^bf16 graphs are not served: .* fp32, fp16, int8, fp8,"):
        write_repository(bundle, tmp_path / "repository")
    mixed = write_bundle(tmp_path / "mixed")
    graphs = mixed.graphs | {"vae_decoder": replace(mixed.graphs["vae_decoder"], dtype="bf16")}
    with pytest.raises(ValueError, match=r"^bf16 graphs are not served: "):
        write_repository(replace(mixed, graphs=graphs), tmp_path / "repository")
    assert only(tmp_path) == ["mixed", "onnx"]


@pytest.mark.parametrize(
    ("graph", "said", "message"),
    [
        ("guided_step", {"checkpoint": "abc"}, "its checkpoint is 'abc', where the manifest has"),
        ("guided_step", {"graph": "transformer"}, "its graph is 'transformer', where the manif"),
        ("transformer", {"dtype": "fp32"}, "its dtype is 'fp32', where the manifest has 'fp16'"),
        ("vae_decoder", {"checkpoint": "abc"}, "its checkpoint is 'abc', where the manifest has"),
    ],
)
def test_a_graph_of_another_export_among_them(
    tmp_path: Path, graph: str, said: dict[str, str], message: str
) -> None:
    """It is listed with its own SHA-256, so that only what it says of itself gives it away."""
    bundle = write_bundle(tmp_path / "onnx", graphs={graph: said})
    with pytest.raises(ValueError, match=rf"{graph}\.onnx: comes from another export: {message}"):
        write_repository(bundle, tmp_path / "repository")
    assert only(tmp_path) == ["onnx"]


def test_readme_explains_the_coefficients(tmp_path: Path, bundle: Bundle) -> None:
    """By its own words: the loop that it describes, on the graph's function, is the sampler's."""
    text = (write_repository(bundle, tmp_path / "repository") / "README.md").read_text()
    code = re.search(r"schedule are `(step_coefficients\(.*\))` of", text)
    assert code is not None and "This model learns its variance." in text
    names = {"step_coefficients": step_coefficients, "make_schedule": make_schedule}
    rows = eval(code[1], names)
    assert rows.shape == (50, 9)
    (a, b, c1, c2, c3, c4, low, high, s), rng = rows[7], np.random.default_rng(0)
    z, eps, v, noise, before = rng.standard_normal((5, 1, 4, 8, 8))
    x0 = a * z + b * eps
    mean = c1 * x0 + c2 * z + c3 * eps + c4 * before
    expected = mean + s * np.exp((low + (v + 1) / 2 * (high - low)) / 2) * noise

    class Model(torch.nn.Module):
        config = tiny_dit().config
        pos_embed = torch.empty(0, dtype=torch.float64)

        def forward(self, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            both = torch.from_numpy(np.concatenate([eps, v], axis=1))
            return both.expand(len(x), -1, -1, -1)

    step = GuidedStep(Model(), guided_channels=3).double()
    tensors = [torch.from_numpy(value) for value in (z, before, noise)]
    zero, scale = torch.zeros(1, dtype=torch.int64), torch.full((1,), 4.0)
    with torch.inference_mode():
        actual, _ = step(*tensors, zero, zero, scale, torch.from_numpy(rows[7:8]))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_readme_tells_the_models_diffusion(tmp_path: Path) -> None:
    diffusion = Diffusion(num_train_steps=100, prediction="v_prediction", clip=2.0)
    bundle = write_bundle(tmp_path / "onnx", model=tiny_dit(diffusion=diffusion))
    text = (write_repository(bundle, tmp_path / "repository") / "README.md").read_text()
    assert 'make_schedule(50, "official", diffusion)' in text
    assert "this model has num_train_steps 100, prediction v_prediction, clip 2.0." in text
    assert "| optional, 1 to 100; the sampler's usual number by default |" in text
