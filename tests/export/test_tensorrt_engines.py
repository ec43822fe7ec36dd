"""Engines that TensorRT for RTX really builds, for which it needs no GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from exports import exported, random_vae
from tiny import tiny_dit

from dit_export import cli, cli_tensorrt
from dit_export.bundle import Bundle
from dit_export.onnx.export import ExportOptions, export_onnx
from dit_export.tensorrt import network
from dit_export.tensorrt.build import BuildOptions, build_bundle, engine_key, graph_hash
from dit_export.tensorrt.engine_files import EngineRefused, find_engines, read_description
from dit_export.tensorrt.installed import Flavour, choose_flavour
from dit_export.tensorrt.network import attach_timing_cache, process_logger, save_timing_cache
from dit_export.tensorrt.profiles import parse_profiles

trt = pytest.importorskip("tensorrt_rtx")

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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "graphs", "options"),
    [
        # The VAE, which attends, is in float32 beside fp16.
        ("fp16", ("guided_step", "conditioner", "denoiser", "vae_decoder"), {}),
        ("bf16", ("transformer", "vae_decoder"), {}),
        ("int8", ("denoiser",), {"calibration_images": 1, "calibration_steps": 2}),
        ("fp8", ("denoiser",), {"calibration_images": 1, "calibration_steps": 2}),
        ("fp32", ("denoiser",), {}),
    ],
)
def test_every_graph_is_built(
    dtype: str, graphs: tuple[str, ...], options: dict[str, Any], flavour: Flavour,
    tmp_path: Path,
) -> None:  # fmt: skip
    made = ExportOptions(dtype, "tensorrt", graphs=graphs, **options)
    bundle = export_onnx(MODEL, tmp_path / "onnx", made, vae=random_vae())
    assert tuple(bundle.graphs) == graphs
    assert bundle.opset == (20 if dtype == "fp32" else 23)
    lines: list[str] = []
    engines = build_bundle(bundle, tmp_path / "engines", flavour, SIZED, report=lines.append)
    assert set(engines) == set(bundle.graphs) and all("built in" in line for line in lines)
    for name, engine in engines.items():
        graph, vaes = bundle.graphs[name], name == "vae_decoder"
        free = {
            n.name: tuple(-1 if isinstance(d, str) else d for d in n.shape) for n in graph.inputs
        }
        assert engine.inputs == free
        assert set(engine.outputs) == {tensor.name for tensor in graph.outputs}
        data = engine.read()
        assert data[:4] == b"vtrt" and len(data) == engine.bytes > 10_000
        assert read_description(engine.path) == engine and engine.dtype == graph.dtype
        assert (engine.key.profiles[0].size is not None) == vaes
        assert engine.checkpoint == (bundle.vae_checkpoint if vaes else bundle.checkpoint)


@pytest.mark.slow
def test_a_block_of_xl_2_is_built(flavour: Flavour, tmp_path: Path) -> None:
    """Of the published width and number of heads, on its 256 tokens; the other 27 are alike."""
    model = tiny_dit(depth=1, hidden_size=1152, num_heads=16, input_size=32)
    made = ExportOptions("fp16", "tensorrt", graphs=("denoiser",))
    bundle = export_onnx(model, tmp_path / "onnx", made)
    operators = [node.op_type for node in onnx.load(bundle.file("denoiser")).graph.node]
    assert operators.count("Attention") == 1
    engine = build_bundle(bundle, tmp_path / "engines", flavour, SIZED)["denoiser"]
    assert engine.outputs == {"output": (-1, 8, 32, 32)} and engine.bytes > 2**24


def test_what_tensorrt_would_refuse_is_said(parts: Bundle, flavour: Flavour, tmp_path: Path):
    with pytest.raises(ValueError, match="fp32 graphs for onnxruntime, which TensorRT does not"):
        build_bundle(exported("fp32", "conditioner", external_data_mib=0), tmp_path, flavour, SIZED)
    model = onnx.load(str(parts.file("conditioner")))
    node = next(n for n in model.graph.node if n.op_type == "Gemm")
    node.op_type, node.domain = "Nonesuch", "who.knows"
    model.opset_import.append(onnx.helper.make_opsetid("who.knows", 1))
    path = tmp_path / "conditioner.onnx"
    onnx.save(model, str(path))
    logger = process_logger(trt)
    with pytest.raises(ValueError, match=rf"node {node.name} \(Nonesuch\): ") as caught:
        network.parse(trt, trt.Builder(logger), logger, path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_what_the_builder_refuses_is_said(flavour: Flavour, tmp_path: Path):
    """TensorRT has no float32 kernel for the Attention operator of opset 23."""
    wrong = ExportOptions("fp32", "onnxruntime", opset=23, graphs=("denoiser",))
    bundle = replace(export_onnx(MODEL, tmp_path / "wrong", wrong), target="tensorrt")
    with pytest.raises(ValueError, match="Attention operation was not supported"):
        build_bundle(bundle, tmp_path / "engines", flavour, SIZED)
    assert not (tmp_path / "engines").exists()


def test_an_engine_that_is_there_is_kept_unless_it_is_damaged(
    parts: Bundle, flavour: Flavour, tmp_path: Path
):
    lines: list[str] = []
    first = conditioner(parts, tmp_path, flavour)
    written = first.path.stat().st_mtime_ns
    assert conditioner(parts, tmp_path, flavour, lines.append) == first
    assert first.path.stat().st_mtime_ns == written and "is there already" in lines[0]
    first.path.write_bytes(first.path.read_bytes()[:-100])
    with pytest.raises(EngineRefused, match=r"truncated, .*--rebuild"):
        conditioner(parts, tmp_path, flavour)
    again = conditioner(parts, tmp_path, flavour, rebuild=True)
    assert again.read() and again.path.stat().st_mtime_ns > written


def test_keys_hold_what_an_engine_depends_on(parts: Bundle, flavour: Flavour):
    graph, sha = parts.graphs["conditioner"], graph_hash(parts, "conditioner")
    assert sha != graph_hash(parts, "vae_decoder")

    def key(**options: Any):
        return engine_key(sha, graph, flavour, replace(SIZED, **options))

    assert key().graph == sha and key().version == flavour.version and key().target == "any"
    assert key(capabilities=("8.9", "12.0")).target == "8.9 12.0"
    assert key(workspace_gib=0.5).workspace_bytes == 2**29 and key().workspace_bytes == 2**28
    # A graph whose size is fixed does not depend on the sizes of the VAE's.
    assert key(profiles=parse_profiles(["1,2,8"], "8,8,8")) == key()
    standard = Flavour("tensorrt", "tensorrt", "10.13.2.6")
    with pytest.raises(ValueError, match="only TensorRT for RTX builds for others"):
        engine_key("0", graph, standard, replace(SIZED, capabilities=("8.9",)))


def test_nothing_is_left_of_a_build_that_fails(
    parts: Bundle, flavour: Flavour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(path: Path, data: object) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        conditioner(parts, tmp_path, flavour)
    assert list(tmp_path.iterdir()) == []


def test_engines_for_named_devices_and_several_profiles(
    parts: Bundle, flavour: Flavour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):  # fmt: skip
    """And the progress of a build reaches its end, without turning back."""
    bars, seen = [], []
    original = network.make_progress

    def watched(*arguments: Any) -> Any:
        bars.append(original(*arguments))
        bar = bars[0].bar
        update = bar.update
        bar.update = lambda n: (update(n), seen.append(bar.n))
        return bars[0]

    monkeypatch.setattr(network, "make_progress", watched)
    profiles = parse_profiles(["1,2,2", "4,8,16"])
    options = {"capabilities": ("8.9", "12.0"), "profiles": profiles, "quiet": False}
    engine = conditioner(parts, tmp_path, flavour, **options)
    assert engine.key.target == "8.9 12.0" and engine.key.profiles == profiles
    assert len(seen) > 3 and seen == sorted(seen) and seen[-1] == pytest.approx(1.0)
    assert "conditioner:" in capfd.readouterr().err
    with pytest.raises(ValueError, match=r"capability '9\.0': choose from 7\.5, 8\.0"):
        conditioner(parts, tmp_path, flavour, capabilities=("9.0",))


def run(*arguments: object) -> int:
    return cli.main(["tensorrt", *map(str, arguments)])


def test_command_builds_from_an_export(
    parts: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "engines"
    code = run("--onnx", parts.path, "-o", out, "--graphs", "conditioner", "vae_decoder",
               "--batch", "1,1,2", "--workspace-gb", "0.5", "--quiet")  # fmt: skip
    assert code == 0
    (first,), (vae,) = (find_engines(out, name) for name in ("conditioner", "vae_decoder"))
    assert first.key.workspace_bytes == 2**29
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
        (["--graphs", "conditioner", "--size", "8"], "--size is for vae_decoder, and no such"),
        (["--dtype", "bf16"], "--dtype bf16: the export "),
        (["--onnx", "."], "not an export; manifest.json is missing"),
        (["-o", "setup.py"], "is a file; a directory is needed"),
    ],
)
def test_command_refuses_bad_input(
    arguments: list[str], reason: str, parts: Bundle, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.chdir(Path(__file__).parents[2])
    code = run("--onnx", parts.path, "-o", tmp_path / "out", *arguments)
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and reason in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_model_is_exported_beside_its_engines(
    parts: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And not in /tmp, which memory may hold."""
    exports: list[Path] = []

    def export(source: object, dtype: str, directory: Path, graphs: object) -> Bundle:
        assert directory.parent.is_dir()
        exports.append(directory.parent.resolve())
        return parts

    monkeypatch.setattr(cli_tensorrt, "_export", export)
    out = tmp_path / "deep" / "engines"
    assert run("-o", out, "--graphs", "conditioner", "--quiet") == 0
    assert exports[0].parent == tmp_path / "deep"
    assert [path.name for path in out.parent.iterdir()] == ["engines"]


# TensorRT for RTX times nothing while it builds, but it makes, sets and serialises timing caches
# like the standard TensorRT, which is the only one that our builds give them to.


class Watched:
    """A builder's config that notes what caches are made of."""

    def __init__(self) -> None:
        self.builder = trt.Builder(process_logger(trt))
        self.config = self.builder.create_builder_config()
        self.set_timing_cache = self.config.set_timing_cache
        self.get_timing_cache = self.config.get_timing_cache
        self.made_of: list[bytes] = []

    def create_timing_cache(self, content: bytes) -> Any:
        self.made_of.append(content)
        return self.config.create_timing_cache(content)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("earlier", [None, b"", b"garbage", b"\xff" * 10_000])
def test_a_timing_cache_is_written_and_used_again(tmp_path: Path, earlier: bytes | None) -> None:
    """A damaged one counts as none."""
    path, first, second = tmp_path / "engines" / "timing.cache", Watched(), Watched()
    save_timing_cache(first, path)  # of a config without a cache
    assert list(tmp_path.iterdir()) == []
    if earlier is not None:
        path.parent.mkdir()
        path.write_bytes(earlier)
    attach_timing_cache(first, path)
    assert first.made_of[0] == (earlier or b"")
    save_timing_cache(first, path)
    written = path.read_bytes()
    assert len(written) > 0 and written != earlier
    assert [p.name for p in path.parent.iterdir()] == ["timing.cache"]
    attach_timing_cache(second, path)
    assert second.made_of == [written]
    assert bytes(second.get_timing_cache().serialize()) == written


@pytest.mark.parametrize("refused", ["create", "set"])
def test_a_cache_that_tensorrt_refuses_gives_way_to_an_empty_one(
    tmp_path: Path, refused: str
) -> None:
    path, kept = tmp_path / "timing.cache", []
    path.write_bytes(b"of another version")

    def create(content: bytes) -> SimpleNamespace | None:
        return None if content and refused == "create" else SimpleNamespace(content=content)

    def set_cache(cache: SimpleNamespace, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.content and refused == "set":
            return False
        kept.append(cache.content)
        return True

    config = SimpleNamespace(create_timing_cache=create, set_timing_cache=set_cache)
    attach_timing_cache(config, path)
    assert kept == [b""]
