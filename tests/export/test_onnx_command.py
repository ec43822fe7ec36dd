"""``dit-export onnx`` and the options of an export: what is refused, and that nothing is left."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from tiny import tiny_dit

from dit_engine.checkpoint import save_pretrained
from dit_engine.config import ModelConfig
from dit_export.bundle import Bundle, ExportFailed
from dit_export.cli import main
from dit_export.onnx import export as export_module
from dit_export.onnx import files, verify
from dit_export.onnx.export import ExportOptions, export_onnx
from dit_export.onnx.verify import check
from dit_export.source import model_name
from dit_export.targets import GRAPHS, choose_opset, float_dtype, vae_dtype


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_pretrained(tmp_path / "model", tiny_dit())
    return tmp_path / "model"


def failed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a refused command says."""
    assert main([str(a) for a in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said.removeprefix("error: ").rstrip("\n")


def test_command_writes_an_export(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["onnx", "--model", str(source), "--dtype", "fp32", "--opset", "21",
                 "--graphs", "conditioner", "-o", str(out)]  # fmt: skip
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "conditioner" in said and "(bound 1e-05) against torch in float32" in said
    bundle = Bundle.open(out)
    assert bundle.opset == 21 and list(bundle.graphs) == ["conditioner"]
    assert onnx.load(bundle.file("conditioner")).opset_import[0].version == 21
    message = failed(capsys, *arguments)
    assert message == (
        f"{out}: holds an export already (fp32 for onnxruntime); --overwrite replaces it; "
        "nothing was written"
    )


LEFT_OUT = "is for graphs transformer, guided_step, denoiser, which --graphs leaves out"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "fp4"], "dtype 'fp4': choose one of fp32, fp16, bf16, int8, fp8"),
        (["--target", "coreml"],
         "target 'coreml': choose one of onnxruntime, tensorrt, openvino"),
        (["--opset", "26"], "opset 26 for fp16 and onnxruntime: allowed is 18 to 25"),
        (["--opset", "17"], "opset 17 for fp16 and onnxruntime: allowed is 18 to 25"),
        (["--dtype", "bf16", "--opset", "21"],
         "opset 21 for bf16 and onnxruntime: allowed is 22 to 25"),
        (["--dtype", "fp32", "--target", "tensorrt", "--opset", "23"],
         "opset 23 for fp32 and tensorrt: allowed is 18 to 20"),
        (["--graphs", "unet"],
         f"graph 'unet': choose one of {', '.join(GRAPHS)}"),
        (["--vae-dtype", "int8"], "vae_dtype 'int8': choose one of fp32, fp16, bf16"),
        (["--external-data", "2048"], "external data above 2048 MiB: allowed is 0 to 2047"),
        (["--dtype", "int8", "--calibration-steps", "1"],
         "calibration_steps 1: allowed is 2 or more"),
        (["--calibration-steps", "8"], "--calibration-steps is for int8 and fp8, and not for fp16"),
        (["--dtype", "int8", "--graphs", "conditioner", "vae_decoder", "--calibration-images", "2"],
         f"--calibration-images {LEFT_OUT}"),
        (["--dtype", "fp8", "--calibration-steps", "8", "--graphs", "conditioner"],
         f"--calibration-steps {LEFT_OUT}"),
        (["--guidance-channels", "5"], "guidance_channels 5 is out of range: allowed is 1 to 4"),
        (["--guidance-channels", "3", "--graphs", "conditioner", "denoiser"],
         "--guidance-channels is for graph 'guided_step', which --graphs leaves out"),
        (["--vae-dtype", "fp32", "--graphs", "transformer", "guided_step"],
         "--vae-dtype is for graph 'vae_decoder', which --graphs leaves out"),
        (["--vae-dtype", "fp32"],
         "--vae-dtype is for graph 'vae_decoder': this model has no VAE; give one with --vae"),
        (["--graphs", "vae_decoder"],
         "graph 'vae_decoder': this model has no VAE; give one with --vae"),
    ],
)  # fmt: skip
def test_options_out_of_range(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str],
    message: str,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert failed(capsys, "onnx", "--model", source, "-o", out, *arguments) == message
    assert not out.exists()


def test_a_size_needs_its_weights_and_they_must_be_of_that_size(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    end = ["-o", tmp_path / "out"]
    assert failed(capsys, "onnx", "--model", "DiT-XL/2", *end) == (
        "--model DiT-XL/2 is a size: give its weights with --checkpoint"
    )
    assert failed(capsys, "onnx", "--model", "DiT-S/2", "--checkpoint", source, *end) == (
        f"{source}: no DiT-S/2; it has depth 2, hidden_size 48, num_heads 2, patch_size 2"
    )
    message = failed(capsys, "onnx", "--model", "builtin", "--checkpoint", source, *end)
    assert message.startswith("--model builtin: with --checkpoint it is one of DiT-S/2, DiT-S/4")
    assert model_name(ModelConfig.named("DiT-XL/4", 512)) == "DiT-XL/4"


def test_unknown_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert failed(capsys, "coreml") == "command 'coreml': choose one of onnx, tensorrt, triton"
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0 and "onnx" in capsys.readouterr().out


def test_a_missing_package_names_the_extra(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for package in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setattr(files, "find_spec", lambda name, gone=package: name != gone or None)
        message = failed(capsys, "onnx", "--model", source, "-o", tmp_path / "out")
        assert message == f"{package} is not installed: pip install 'dit-engine[onnx]'"


def test_a_full_disk_halfway_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = export_module.save, []

    def full(model: object, path: Path, limit: int) -> None:
        save(model, path, limit)
        saved.append(path)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "save", full)
    options = ExportOptions("fp32", graphs=("conditioner", "denoiser"))
    with pytest.raises(OSError, match="No space left"):
        export_onnx(tiny_dit(depth=1), tmp_path / "out", options)
    assert saved[0].parent != tmp_path / "out"  # it was written, elsewhere
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "to_onnx", lambda *_: pytest.fail("it began"))
    with pytest.raises(ValueError, match=r"^2 label names for 10 classes$"):
        export_onnx(tiny_dit(), tmp_path / "out", label_names=("ant", "bee"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ValueError, match=r"holds something else \(photo\.jpg\); nothing was"):
        export_onnx(tiny_dit(), tmp_path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_graph_that_computes_something_else_is_no_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is made of a model with one wrong weight; the run beside torch finds it."""
    exportable, made = export_module.exportable, []

    def wrong_once(model: object, dtype: torch.dtype, *rest: object) -> object:
        twin = exportable(model, dtype, *rest)
        if not made:
            made.append(twin)
            twin.blocks[1].adaLN_modulation[1].bias = torch.nn.Parameter(
                twin.blocks[1].adaLN_modulation[1].bias + 1e-2, requires_grad=False
            )
        return twin

    monkeypatch.setattr(export_module, "exportable", wrong_once)
    with pytest.raises(ExportFailed, match=r"^conditioner: onnxruntime .* differ by .*, above"):
        export_onnx(tiny_dit(), tmp_path / "out", ExportOptions("fp32", graphs=("conditioner",)))
    assert list(tmp_path.iterdir()) == []


def test_what_an_export_finds_wrong_is_one_line_of_the_command(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(verify.BOUNDS, "fp32", 1e-12)
    command = ["onnx", "--model", source, "--dtype", "fp32", "--graphs", "conditioner"]
    message = failed(capsys, *command, "-o", tmp_path / "out")
    assert message.startswith("conditioner: onnxruntime ") and message.endswith("above 1e-12")

    def broken(path: Path) -> object:
        raise onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented("no\nkernel for Attention")

    monkeypatch.setattr(verify, "_onnxruntime", broken)
    message = failed(capsys, *command, "-o", tmp_path / "out")
    assert message == "conditioner: cannot be run: no kernel for Attention"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_checker_finds_a_broken_file(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    z = onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [1])  # made by no node
    graph = onnx.helper.make_graph([node], "broken", [x], [z])
    (tmp_path / "broken.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(ExportFailed, match=r"^broken: no valid ONNX: "):
        check(tmp_path / "broken.onnx", "broken")


def test_defaults() -> None:
    for dtype, target, opset, inside, vae in (
        ("fp32", "onnxruntime", 23, "fp32", "fp32"),
        ("fp32", "tensorrt", 20, "fp32", "fp32"),
        ("fp16", "tensorrt", 23, "fp16", "fp32"),
        ("bf16", "openvino", 23, "bf16", "bf16"),
        ("int8", "onnxruntime", 23, "fp32", "fp32"),
        ("fp8", "tensorrt", 23, "fp16", "fp32"),
    ):
        assert choose_opset(dtype, target) == opset
        assert (float_dtype(dtype, target), vae_dtype(dtype, target)) == (inside, vae)
