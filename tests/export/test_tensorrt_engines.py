"""Engines really built by TensorRT for RTX, which needs no GPU: graphs, cache, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from exports import exported, random_vae
from tiny import tiny_dit

from dit_engine.engine import Engine
from dit_export import cli, cli_tensorrt
from dit_export.bundle import Bundle
from dit_export.tensorrt.build import BuildOptions, build_bundle, engine_key, graph_hash
from dit_export.tensorrt.cuda_devices import CudaDevice
from dit_export.tensorrt.engine_files import (
    EngineFile,
    EngineRefused,
    find_engines,
    read_description,
)
from dit_export.tensorrt.flavour import Flavour, choose_flavour
from dit_export.tensorrt.profiles import parse_profiles

trt = pytest.importorskip("tensorrt_rtx")
pytest.importorskip("onnxscript")

H200 = CudaDevice("NVIDIA H200", "9.0")
# What is exported together.
GRAPHS = {
    "fp16": ("conditioner", "denoiser", "vae_decoder"),
    "fp16 whole": ("transformer", "guided_step"),
    "bf16": ("transformer", "vae_decoder"),
    "bf16 parts": ("guided_step", "conditioner", "denoiser"),
}
MODEL = tiny_dit(depth=1)
BATCH = "1,2,8"
SIZE = "4,8,16"


@pytest.fixture(scope="module")
def flavour() -> Flavour:
    return choose_flavour("rtx")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """A tiny DiT with the built-in model's VAE, exported for TensorRT; by a name of `GRAPHS`."""
    from dit_export.onnx.export import ExportOptions, export_onnx

    folder = tmp_path_factory.mktemp("onnx")
    made: dict[str, Bundle] = {}

    def bundle(name: str) -> Bundle:
        if name not in made:
            dtype, graphs = name.split()[0], GRAPHS[name]
            vae = Engine.from_pretrained("builtin", device="cpu").vae
            options = ExportOptions(dtype, "tensorrt", graphs=graphs, vae_dtype=dtype)
            made[name] = export_onnx(MODEL, folder / name, options, vae=vae)
        return made[name]

    return bundle


@pytest.fixture(scope="module")
def options() -> BuildOptions:
    return BuildOptions(parse_profiles([BATCH], SIZE), workspace_gib=0.25, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("exported", GRAPHS)
def test_every_graph_is_supported_and_built(
    exported: str, bundles, options: BuildOptions, flavour: Flavour, tmp_path: Path
):
    from dit_export.tensorrt.network import check_supported

    bundle, names = bundles(exported), GRAPHS[exported]
    assert tuple(bundle.graphs) == names
    for name in names:
        assert check_supported(flavour, bundle.file(name)) == []
    lines: list[str] = []
    engines = build_bundle(bundle, tmp_path, flavour, options, report=lines.append)
    assert len(lines) == len(names) and all("built in" in line for line in lines)
    for name, engine in engines.items():
        graph = bundle.graphs[name]
        free = {
            n.name: tuple(-1 if isinstance(d, str) else d for d in n.shape) for n in graph.inputs
        }
        assert engine.inputs == free
        assert set(engine.outputs) == {tensor.name for tensor in graph.outputs}
        data = engine.read()
        assert data[:4] == b"vtrt" and len(data) == engine.bytes > 10_000
        assert read_description(engine.path) == engine
        size = engine.key.profiles[0].size
        assert (size is not None) == (name == "vae_decoder")
        assert engine.dtype == graph.dtype == exported.split()[0]
        vaes = name == "vae_decoder"
        assert engine.checkpoint == (bundle.vae_checkpoint if vaes else bundle.checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "int8", "fp8"])
def test_an_export_with_its_defaults_is_taken(
    dtype: str, options: BuildOptions, flavour: Flavour, tmp_path: Path
):
    """With a VAE that attends, in float32 beside whatever the transformer is in."""
    from dit_export.onnx.export import ExportOptions, export_onnx

    made = ExportOptions(
        dtype, "tensorrt", graphs=("denoiser", "vae_decoder") if dtype == "fp16" else ("denoiser",),
        calibration_images=1, calibration_steps=2,
    )  # fmt: skip
    bundle = export_onnx(MODEL, tmp_path / "onnx", made, vae=random_vae())
    engines = build_bundle(bundle, tmp_path / "engines", flavour, options)
    assert set(engines) == set(bundle.graphs)
    assert all(engine.bytes > 10_000 for engine in engines.values())


def test_an_export_for_another_runtime_is_refused(
    options: BuildOptions, flavour: Flavour, tmp_path: Path
):
    bundle = exported("fp32", "conditioner")
    with pytest.raises(ValueError, match="fp32 graphs for onnxruntime, which TensorRT does not"):
        build_bundle(bundle, tmp_path, flavour, options)


def test_an_engine_that_is_there_is_kept(
    bundles, options: BuildOptions, flavour: Flavour, tmp_path: Path
):
    bundle, lines = bundles("fp16"), []
    first = build_bundle(bundle, tmp_path, flavour, options, ("conditioner",))["conditioner"]
    written = first.path.stat().st_mtime_ns
    second = build_bundle(bundle, tmp_path, flavour, options, ("conditioner",), lines.append)
    assert second["conditioner"] == first and first.path.stat().st_mtime_ns == written
    assert "is there already" in lines[0]
    build_bundle(bundle, tmp_path, flavour, replace(options, rebuild=True), ("conditioner",))
    assert first.path.stat().st_mtime_ns > written


def test_every_part_of_the_key_makes_another_file(
    bundles, options: BuildOptions, flavour: Flavour, tmp_path: Path
):
    bundle = bundles("fp16")
    graph, sha = bundle.graphs["denoiser"], graph_hash(bundle, "denoiser")
    other = graph_hash(bundle, "conditioner")
    keys = [
        engine_key(sha, graph, flavour, options),
        engine_key(other, graph, flavour, options),
        engine_key(sha, graph, replace(flavour, version="1.6.1.120"), options),
        engine_key(sha, graph, flavour, replace(options, capabilities=("8.9",))),
        engine_key(sha, graph, flavour, replace(options, workspace_gib=1)),
        engine_key(sha, graph, flavour, replace(options, profiles=parse_profiles(["1,2,9"]))),
        engine_key(sha, graph, flavour, replace(options, profiles=parse_profiles(["1,2,8", "16"]))),
        replace(engine_key(sha, graph, flavour, options), flavour="tensorrt"),
        replace(engine_key(sha, graph, flavour, options), plugins=("dit::layernorm_modulate",)),
    ]
    assert len({key.digest for key in keys}) == len(keys)
    # A graph whose size is fixed does not depend on the sizes of the VAE's.
    sized = replace(options, profiles=parse_profiles([BATCH], "8,8,8"))
    assert engine_key(sha, graph, flavour, sized) == keys[0]


def test_graphs_have_hashes_of_their_own(bundles):
    fp16, bf16 = bundles("fp16"), bundles("bf16")
    hashes = {graph_hash(b, name) for b in (fp16, bf16) for name in b.graphs}
    assert len(hashes) == 5


@pytest.fixture
def built(bundles, options: BuildOptions, flavour: Flavour, tmp_path: Path) -> EngineFile:
    engines = build_bundle(bundles("fp16"), tmp_path, flavour, options, ("conditioner",))
    return engines["conditioner"]


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_truncate, "truncated, "),
        (damage_flip, "has changed since it was built"),
        (Path.unlink, "is missing"),
    ],
)
def test_damaged_engine_is_refused_and_rebuilt_on_request(
    damage, reason: str, built: EngineFile, bundles, options: BuildOptions, flavour: Flavour
):
    damage(built.path)
    folder, bundle = built.path.parent, bundles("fp16")
    for use in (
        built.read,
        lambda: build_bundle(bundle, folder, flavour, options, ("conditioner",)),
    ):
        with pytest.raises(EngineRefused, match=reason) as caught:
            use()
        assert "--rebuild" in str(caught.value) and "\n" not in str(caught.value)
    again = replace(options, rebuild=True)
    build_bundle(bundle, folder, flavour, again, ("conditioner",))["conditioner"].read()


def test_engine_of_another_version_or_device_is_refused(built: EngineFile):
    built.check("rtx", built.key.version, H200)  # "any" device
    with pytest.raises(EngineRefused, match=r"built by TensorRT rtx .*, this is rtx 1\.8"):
        built.check("rtx", "1.8")
    with pytest.raises(EngineRefused, match=r"this is tensorrt 10\.3"):
        built.check("tensorrt", "10.3")
    for target in ("8.9 12.0", "NVIDIA H100 (9.0)"):
        other = replace(built, key=replace(built.key, target=target))
        with pytest.raises(EngineRefused, match=r"built for .*, this is NVIDIA H200 \(9\.0\)"):
            other.check("rtx", built.key.version, H200)
    for target in ("9.0", "8.9 9.0", "NVIDIA H200 (9.0)"):
        replace(built, key=replace(built.key, target=target)).check("rtx", built.key.version, H200)


def test_descriptions_that_are_none(built: EngineFile):
    assert find_engines(built.path.parent, "conditioner") == [built]
    with pytest.raises(EngineRefused, match="another model's weights"):
        find_engines(built.path.parent, "conditioner", "0" * 64)
    with pytest.raises(EngineRefused, match="is in fp16; precision 'bf16' is asked"):
        find_engines(built.path.parent, "conditioner", built.checkpoint, "bf16")
    with pytest.raises(EngineRefused, match="holds no engine of denoiser"):
        find_engines(built.path.parent, "denoiser")
    with pytest.raises(EngineRefused, match="has these weights with another config"):
        find_engines(built.path.parent, "conditioner", built.checkpoint, model={"depth": 2})
    assert built.model == MODEL.config.to_dict()
    values = json.loads(built.description.read_text())
    for text in ("{", "[]", json.dumps(values | {"format": 9}), json.dumps(values | {"key": {}})):
        built.description.write_text(text)
        with pytest.raises(EngineRefused, match="cannot be read"):
            read_description(built.path)
        with pytest.raises(EngineRefused, match=r"cannot be read: .* --rebuild"):
            find_engines(built.path.parent, "conditioner")
    built.description.unlink()
    with pytest.raises(EngineRefused, match="no engine of ours"):
        read_description(built.path)


def test_nothing_is_left_of_a_build_that_fails(
    bundles, options: BuildOptions, flavour: Flavour, tmp_path: Path, monkeypatch
):
    def full(path: Path, data: object) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        build_bundle(bundles("fp16"), tmp_path, flavour, options, ("conditioner",))
    assert list(tmp_path.iterdir()) == []


def test_refused_node_is_named(bundles, flavour: Flavour, options: BuildOptions, tmp_path: Path):
    import onnx

    from dit_export.tensorrt.build import build_engine
    from dit_export.tensorrt.network import check_supported

    bundle = bundles("fp16")
    model = onnx.load(str(bundle.file("denoiser")))
    node = next(n for n in model.graph.node if n.name == "blocks.0.attn.qkv/MatMul")
    node.op_type, node.domain = "Nonesuch", "who.knows"
    model.opset_import.append(onnx.helper.make_opsetid("who.knows", 1))
    path = tmp_path / "denoiser.onnx"
    onnx.save(model, str(path))
    graph = bundle.graphs["denoiser"]
    key = engine_key("0" * 64, graph, flavour, options)
    with pytest.raises(
        ValueError, match=r"node blocks\.0\.attn\.qkv/MatMul \(Nonesuch\): "
    ) as caught:
        build_engine(path, graph, "", {}, key, tmp_path / "out", flavour, options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert "Nonesuch" in check_supported(flavour, path)[0]


@pytest.mark.slow
def test_what_the_builder_refuses_is_said(bundles, flavour: Flavour, tmp_path: Path):
    """TensorRT has no float32 kernel for the Attention operator of opset 23."""
    from dit_export.onnx.export import ExportOptions, export_onnx

    options = BuildOptions(parse_profiles([BATCH]), quiet=True)
    wrong = ExportOptions("fp32", "onnxruntime", opset=23, graphs=("denoiser",))
    bundle = replace(export_onnx(MODEL, tmp_path / "wrong", wrong), target="tensorrt")
    with pytest.raises(ValueError, match="Attention operation was not supported"):
        build_bundle(bundle, tmp_path / "engines", flavour, options)
    right = ExportOptions("fp32", "tensorrt", graphs=("denoiser",))
    bundle = export_onnx(MODEL, tmp_path / "right", right)
    assert bundle.opset == 20
    assert build_bundle(bundle, tmp_path / "engines", flavour, options)["denoiser"].bytes > 10_000


def test_engines_for_named_devices(
    bundles, options: BuildOptions, flavour: Flavour, tmp_path: Path
):
    bundle = bundles("fp16")
    named = replace(options, capabilities=("8.9", "12.0"))
    engine = build_bundle(bundle, tmp_path, flavour, named, ("conditioner",))["conditioner"]
    assert engine.key.target == "8.9 12.0"
    with pytest.raises(ValueError, match=r"capability '9\.0': choose from 7\.5, 8\.0"):
        build_bundle(
            bundle, tmp_path, flavour, replace(options, capabilities=("9.0",)), ("denoiser",)
        )


def test_several_profiles_in_one_engine(bundles, flavour: Flavour, tmp_path: Path):
    options = BuildOptions(parse_profiles(["1,2,2", "4,8,16"]), quiet=True)
    engine = build_bundle(bundles("fp16"), tmp_path, flavour, options, ("conditioner",))
    profiles = engine["conditioner"].key.profiles
    assert [str(p.batch) for p in profiles] == ["1 to 2 (best at 2)", "4 to 16 (best at 8)"]


def test_only_the_standard_flavour_holds_the_plugin(
    bundles, options: BuildOptions, flavour: Flavour
):
    graph = bundles("fp16").graphs["denoiser"]
    standard = Flavour("tensorrt", "tensorrt", "10.13.2.6")
    with pytest.raises(ValueError, match="only TensorRT for RTX builds for others"):
        engine_key("0", graph, standard, replace(options, capabilities=("8.9",)))


def test_progress_reaches_the_end(bundles, flavour: Flavour, capfd: pytest.CaptureFixture[str]):
    from dit_export.tensorrt.network import build_serialized
    from dit_export.tensorrt.reports import make_progress, process_logger

    bundle = bundles("fp16")
    options = BuildOptions(parse_profiles([BATCH]))
    key = engine_key("0", bundle.graphs["conditioner"], flavour, options)
    progress = make_progress(trt, "conditioner", quiet=False)
    seen: list[float] = []
    update = progress.bar.update
    progress.bar.update = lambda n: (update(n), seen.append(progress.bar.n))
    build_serialized(
        trt, bundle.file("conditioner"), key, Path(), flavour, process_logger(trt), progress
    )  # fmt: skip
    progress.close()
    assert len(seen) > 3 and seen == sorted(seen) and seen[-1] == pytest.approx(1.0)
    assert "conditioner:" in capfd.readouterr().err


def run(*arguments: object) -> int:
    return cli.main(["tensorrt", *map(str, arguments)])


def test_command_builds_from_an_export(bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "engines"
    code = run("--onnx", bundles("fp16").path, "-o", out, "--graphs", "conditioner", "vae_decoder",
               "--batch", "1,1,2", "--workspace-gb", "0.5", "--quiet")  # fmt: skip
    assert code == 0
    (conditioner,) = find_engines(out, "conditioner")
    (vae,) = find_engines(out, "vae_decoder")
    assert conditioner.key.workspace_bytes == 2**29
    assert str(vae.key.profiles[0]) == "batch 1 to 2 (best at 1), size 8"  # the model's own
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["conditioner", "vae_decoder"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--batch", "2,1,8"], "batch '2,1,8'"),
        (["--size", "x"], "size 'x': give one number or three"),
        (["--flavour", "trt"], "flavour 'trt': choose one of auto, tensorrt, rtx"),
        (["--graphs", "unet"], "graph 'unet': choose one of transformer"),
        (["--dtype", "fp4"], "dtype 'fp4': choose one of fp32"),
        (["--workspace-gb", "0"], "workspace 0.0 GiB"),
        (["--device", "0"], "--device is for the standard TensorRT, and this is TensorRT for RTX"),
        (["--graphs", "denoiser", "--size", "8"], "--size is for vae_decoder, and no such graph"),
        (["--dtype", "bf16"], "--dtype bf16: the export "),
    ],
)
def test_command_refuses_bad_input(
    arguments: list[str], reason: str, bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    code = run("--onnx", bundles("fp16").path, "-o", tmp_path / "out", *arguments)
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and reason in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_command_refuses_what_is_no_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("--onnx", tmp_path, "-o", tmp_path / "out") == 2
    assert "not an export; manifest.json is missing" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run("--onnx", tmp_path, "-o", tmp_path / "file") == 2
    assert "is a file; a directory is needed" in capsys.readouterr().err


def test_a_model_is_exported_beside_its_engines(
    bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And not in /tmp, which memory may hold."""
    exports: list[Path] = []

    def export(source: object, dtype: str, directory: Path, graphs: object) -> Bundle:
        assert directory.parent.is_dir()
        exports.append(directory.parent.resolve())
        return bundles("fp16")

    monkeypatch.setattr(cli_tensorrt, "_export", export)
    out = tmp_path / "deep" / "engines"
    assert run("-o", out, "--graphs", "conditioner", "--quiet") == 0
    assert exports[0].parent == tmp_path / "deep"
    assert [path.name for path in out.parent.iterdir()] == ["engines"]
