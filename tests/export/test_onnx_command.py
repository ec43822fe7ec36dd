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
from dit_export.onnx import files
from dit_export.onnx.export import ExportOptions, export_onnx
from dit_export.source import model_name


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model"
    save_pretrained(path, tiny_dit())
    return path


def failed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a refused command says."""
    assert main([str(a) for a in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said.removeprefix("error: ").rstrip("\n")


@pytest.mark.slow
def test_command_writes_an_export(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["onnx", "--model", str(source), "--dtype", "fp32", "--opset", "21",
                 "--graphs", "conditioner", "-o", str(out)]  # fmt: skip
    assert main(arguments) == 0
    assert "(bound 1e-05) against torch in float32" in capsys.readouterr().out
    bundle = Bundle.open(out)
    assert bundle.opset == 21 and list(bundle.graphs) == ["conditioner"]
    assert onnx.load(bundle.file("conditioner")).opset_import[0].version == 21
    assert "holds an export already; --overwrite" in failed(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--dtype fp4", "dtype 'fp4': choose one of fp32, fp16, bf16, int8, fp8"),
        ("--opset 26", "opset 26 for fp16 and onnxruntime: allowed is 18 to 25"),
        ("--dtype bf16 --opset 21", "opset 21 for bf16 and onnxruntime: allowed is 22 to 25"),
        ("--target tensorrt --opset 23", "opset 23 for fp32 and tensorrt: allowed is 18 to 20"),
        ("--graphs unet", "graph 'unet': choose one of transformer"),
        ("--vae-dtype int8", "vae_dtype 'int8': choose one of fp32, fp16, bf16"),
        ("--external-data 2048", "external_data_mib 2048: allowed is 0 to 2047"),
        ("--dtype int8 --calibration-steps 1", "calibration_steps 1: allowed is 2 to 1000"),
        ("--calibration-steps 8", "--calibration-steps is for int8 and fp8, and not fp16"),
        ("--dtype int8 --graphs conditioner --calibration-images 2",
         "--calibration-images is for transformer, guided_step, denoiser, which --graphs leaves"),
        ("--guidance-channels 5", "guidance_channels 5 is out of range: allowed is 1 to 4"),
        ("--vae-dtype fp32", "--vae-dtype is for a VAE, and this model has none"),
        ("--graphs vae_decoder", "graph 'vae_decoder': this model has no VAE; give one with --vae"),
        ("--model DiT-XL/2", "--model DiT-XL/2 is a size: give its weights with --checkpoint"),
        ("--model DiT-S/2 --checkpoint SOURCE", ": no DiT-S/2; it has {'depth': 2"),
        ("--model builtin --checkpoint SOURCE", "with --checkpoint it is one of DiT-S/2, DiT-S/4"),
    ],
)  # fmt: skip
def test_options_that_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    out, words = tmp_path / "out", arguments.replace("SOURCE", str(source)).split()
    model = [] if "--model" in words else ["--model", source]
    assert message in failed(capsys, "onnx", *model, "-o", out, *words)
    assert not out.exists()


def test_published_shapes_have_their_names() -> None:
    assert model_name(ModelConfig.named("DiT-XL/4", 512)) == "DiT-XL/4"


def test_unknown_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert failed(capsys, "coreml") == "command 'coreml': choose one of onnx, tensorrt, triton"


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setattr(files, "find_spec", lambda name, gone=package: name != gone or None)
        with pytest.raises(ImportError, match=rf"^{package} is not .* 'dit-engine\[onnx\]'$"):
            export_onnx(tiny_dit(), tmp_path / "out")


def test_what_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "to_onnx", lambda *_: pytest.fail("it began"))
    with pytest.raises(ValueError, match=r"^2 label names for 10 classes$"):
        export_onnx(tiny_dit(), tmp_path / "out", label_names=("ant", "bee"))
    unguided = tiny_dit(has_null_class=False)
    with pytest.raises(ValueError, match="graph 'guided_step': this model has no null class"):
        export_onnx(unguided, tmp_path / "out", ExportOptions(graphs=("guided_step",)))
    possible = ("transformer", "conditioner", "denoiser")
    assert export_module._graphs(ExportOptions(), unguided, None) == possible
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ValueError, match=r"holds something else \(photo\.jpg\); nothing was"):
        export_onnx(tiny_dit(), tmp_path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["photo.jpg"]


@pytest.mark.slow
def test_what_an_export_finds_wrong_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is made of a model with one wrong weight; the run beside torch finds it."""
    exportable, made = export_module.exportable, []
    options = ExportOptions("fp32", graphs=("conditioner",))

    def wrong_once(model: object, dtype: torch.dtype, *rest: object) -> object:
        twin = exportable(model, dtype, *rest)
        if not made:
            made.append(twin)
            twin.blocks[1].adaLN_modulation[1].bias = torch.nn.Parameter(
                twin.blocks[1].adaLN_modulation[1].bias + 1e-2, requires_grad=False
            )
        return twin

    def broken(*_: object, **__: object) -> object:
        raise onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented("no\nkernel for Attention")

    monkeypatch.setattr(export_module, "exportable", wrong_once)
    with pytest.raises(ExportFailed, match=r"^conditioner: onnxruntime .* differ by .*, above"):
        export_onnx(tiny_dit(), tmp_path / "out", options)
    monkeypatch.setattr(onnxruntime, "InferenceSession", broken)
    with pytest.raises(
        ExportFailed, match=r"^conditioner: cannot be run: no kernel for Attention$"
    ):
        export_onnx(tiny_dit(), tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []
