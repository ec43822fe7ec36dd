"""Engines that TensorRT for RTX really builds, for which it needs no GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from exports import exported, random_vae
from tiny import tiny_dit

from dit_export import cli
from dit_export.bundle import Bundle
from dit_export.onnx import export as export_module
from dit_export.onnx.export import ExportOptions, export_onnx
from dit_export.tensorrt.build import BuildOptions, build_bundle, engine_key, graph_hash, parse
from dit_export.tensorrt.engine_files import find_engines, read_description
from dit_export.tensorrt.installed import Flavour, choose_flavour, process_logger
from dit_export.tensorrt.profiles import parse_profiles

trt = pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.slow

MODEL = tiny_dit(depth=1)
SIZED = BuildOptions(parse_profiles(["1,2,8"], "4,8,16"), workspace_gib=0.25, quiet=True)


@pytest.fixture(scope="module")
def flavour() -> Flavour:
    return choose_flavour("rtx")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A conditioner and a VAE in fp16, the VAE as well."""
    options = ExportOptions("fp16", "tensorrt", graphs=("conditioner", "vae_decoder"),
                            vae_dtype="fp16")  # fmt: skip
    return export_onnx(MODEL, tmp_path_factory.mktemp("onnx") / "out", options, vae=random_vae())


def conditioner(parts: Bundle, folder: Path, flavour: Flavour, report=lambda _: None, **options):
    """The engine of the conditioner."""
    options = replace(SIZED, **options)
    return build_bundle(parts, folder, flavour, options, ("conditioner",), report)["conditioner"]


SMALL = {"calibration_images": 1, "calibration_steps": 2}
# Of the published width and number of heads, on its 256 tokens; the other 27 blocks are alike.
XL_2 = {"hidden_size": 1152, "num_heads": 16, "input_size": 32}


@pytest.mark.parametrize(
    ("dtype", "graphs", "options", "model"),
    [
        # The VAE, which attends, is in float32 beside fp16.
        ("fp16", ("guided_step", "vae_decoder"), {}, {}),
        ("fp16", ("denoiser",), {}, XL_2),
        ("bf16", ("transformer", "vae_decoder"), {}, {}),
        ("int8", ("denoiser",), SMALL, {}),
        ("fp8", ("denoiser",), SMALL, {}),
        ("fp32", ("denoiser",), {}, {}),
    ],
)
def test_every_graph_is_built(
    dtype: str, graphs: tuple[str, ...], options: dict[str, Any], model: dict[str, Any],
    flavour: Flavour, tmp_path: Path,
) -> None:  # fmt: skip
    made = ExportOptions(dtype, "tensorrt", graphs=graphs, **options)
    bundle = export_onnx(tiny_dit(depth=1, **model), tmp_path / "onnx", made, vae=random_vae())
    engines = build_bundle(bundle, tmp_path / "engines", flavour, SIZED)
    assert tuple(engines) == tuple(bundle.graphs) == graphs
    for name, engine in engines.items():
        vaes, data = name == "vae_decoder", engine.read()
        assert data[:4] == b"vtrt" and len(data) == engine.bytes > 10_000
        assert read_description(engine.path) == engine and engine.dtype == bundle.graphs[name].dtype
        assert (engine.key.profiles[0].size is not None) == vaes
        assert engine.checkpoint == (bundle.vae_checkpoint if vaes else bundle.checkpoint)


def test_what_tensorrt_refuses_is_said(parts: Bundle, flavour: Flavour, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fp32 graphs for onnxruntime, which TensorRT does not"):
        build_bundle(exported("fp32", "conditioner", external_data_mib=0), tmp_path, flavour, SIZED)
    with pytest.raises(ValueError, match=r"capability '9\.0': choose from 7\.5, 8\.0"):
        conditioner(parts, tmp_path, flavour, capabilities=("9.0",))
    model = onnx.load(str(parts.file("conditioner")))
    node = next(n for n in model.graph.node if n.op_type == "Gemm")
    node.op_type, node.domain = "Nonesuch", "who.knows"
    model.opset_import.append(onnx.helper.make_opsetid("who.knows", 1))
    path = tmp_path / "conditioner.onnx"
    onnx.save(model, str(path))
    logger = process_logger(trt)
    with pytest.raises(ValueError, match=rf"node {node.name} \(Nonesuch\): ") as caught:
        parse(trt, trt.Builder(logger), logger, path)
    assert "\n" not in str(caught.value)


def test_an_engine_that_is_there_is_kept_unless_it_is_damaged(
    parts: Bundle, flavour: Flavour, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    profiles = parse_profiles(["1,2,2", "4,8,16"])
    options = {"capabilities": ("8.9", "12.0"), "profiles": profiles}
    first = conditioner(parts, tmp_path, flavour, **options, quiet=False)
    assert first.key.target == "8.9 12.0" and first.key.profiles == profiles
    assert "conditioner: 00:0" in capfd.readouterr().err
    written = first.path.stat().st_mtime_ns
    assert conditioner(parts, tmp_path, flavour, lines.append, **options) == first
    assert first.path.stat().st_mtime_ns == written and "is there already" in lines[0]
    conditioner(parts, tmp_path, flavour, **options, rebuild=True)
    assert first.path.stat().st_mtime_ns > written
    first.path.write_bytes(first.path.read_bytes()[:-100])
    assert conditioner(parts, tmp_path, flavour, lines.append, **options).read()
    assert "built in" in lines[1]


def test_keys_hold_what_an_engine_depends_on(parts: Bundle, flavour: Flavour) -> None:
    graph, sha = parts.graphs["conditioner"], graph_hash(parts, "conditioner")
    assert sha != graph_hash(parts, "vae_decoder")

    def key(**options: Any):
        return engine_key(sha, graph, flavour, replace(SIZED, **options))

    assert key().graph == sha and key().version == flavour.version and key().target == "any"
    assert key(capabilities=("8.9", "12.0")).target == "8.9 12.0"
    assert key(workspace_gib=0.5).workspace_bytes == 2**29
    # A graph whose size is fixed does not depend on the sizes of the VAE's.
    assert key(profiles=parse_profiles(["1,2,8"], "8,8,8")) == key()
    standard = Flavour("tensorrt", "tensorrt", "10.13.2.6")
    with pytest.raises(ValueError, match="only TensorRT for RTX builds for others"):
        engine_key("0", graph, standard, replace(SIZED, capabilities=("8.9",)))


def run(*arguments: object) -> int:
    return cli.main(["tensorrt", *map(str, arguments)])


@pytest.mark.parametrize("given", [True, False])
def test_command_builds_engines(
    given: bool, parts: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """From an export, or from a model, which is exported beside the engines and not in /tmp."""
    exports: list[Path] = []

    def export(_: object, directory: Path, *__: object, **___: object) -> Bundle:
        assert directory.parent.is_dir()
        exports.append(directory.parent.resolve().parent)
        return parts

    monkeypatch.setattr(export_module, "export_onnx", export)
    out = tmp_path / "deep" / "engines"
    source = ["--onnx", parts.path] if given else []
    code = run(*source, "-o", out, "--batch", "1,1,2", "--workspace-gb", "0.5", "--quiet")
    assert code == 0 and exports == ([] if given else [tmp_path / "deep"])
    assert [path.name for path in out.parent.iterdir()] == ["engines"]
    (first,), (vae,) = (find_engines(out, name) for name in ("conditioner", "vae_decoder"))
    assert first.key.workspace_bytes == 2**29
    assert str(vae.key.profiles[0]) == "batch 1 to 2 (best at 1), size 8"  # the model's own
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["conditioner", "vae_decoder"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--size 0", "size '0': give one positive number"),
        ("--flavour trt", "flavour 'trt': choose one of auto, tensorrt, rtx"),
        ("--graphs unet", "graph 'unet': choose one of transformer"),
        ("--workspace-gb 0", "workspace 0.0 GiB"),
        ("--device 0", "--device is for the standard TensorRT, and this is TensorRT for RTX"),
        ("--graphs conditioner --size 8", "--size is for vae_decoder, and no such"),
        ("-o FILE", "is a file; a directory is needed"),
    ],
)
def test_command_refuses_bad_input(
    arguments: str, reason: str, parts: Bundle, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = arguments.replace("FILE", __file__).split()
    code = run("--onnx", parts.path, "-o", tmp_path / "out", *words)
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and reason in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()
