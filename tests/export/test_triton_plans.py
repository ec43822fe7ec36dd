"""Which TensorRT engines go into a model repository."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_triton_repository import only, parsed, write_bundle

from dit_export.bundle import Bundle
from dit_export.server.configuration import GRAPHS, ServingOptions
from dit_export.server.repository import write_repository
from dit_export.tensorrt.build import graph_hash
from dit_export.tensorrt.engine_files import EngineFile, EngineKey, write_engine
from dit_export.tensorrt.profiles import Profile, Range

OPTIONS = ServingOptions(platform="tensorrt", max_batch_size=4)


def write_engines(directory: Path, bundle: Bundle, **changes: object) -> None:
    """Files that are no engines: here only what stands beside them matters."""
    for graph in GRAPHS.values():
        key = EngineKey(
            graph_hash(bundle, graph), "tensorrt", "10.9", "any", (Profile(Range(1, 4, 8)),)
        )
        checkpoint = bundle.vae_checkpoint if graph == "vae_decoder" else bundle.checkpoint
        key = replace(key, **changes)
        path = directory / f"{graph}-{key.digest}.engine"
        engine = EngineFile(path, graph, checkpoint or "", "fp16", key, {}, {}, "", 0)
        write_engine(engine, f"engine of {graph}".encode())


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "onnx")


def test_engines_become_plans(tmp_path: Path, bundle: Bundle) -> None:
    write_engines(tmp_path / "engines", bundle)
    path = write_repository(bundle, tmp_path / "repository", OPTIONS, engines=tmp_path / "engines")
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
        ({"plugins": ("adaln 1",)}, "holds a plugin that the server does not have"),
        ({"profiles": (Profile(Range(1, 1, 2)),)}, "batches of 1 to 2 .*; 1 to 4 are needed"),
        (
            {"profiles": (Profile(Range(1, 4, 8), Range(32, 64, 96)),)},
            r"takes latents of size 32 to 96 .*; 8 is needed",
        ),
        ({"profiles": (Profile(Range(2, 4, 8)),)}, "batches of 2 to 8 .*; 1 to 4 are needed"),
    ],
)
def test_engines_that_do_not_fit(
    tmp_path: Path, bundle: Bundle, changes: dict[str, object], message: str
) -> None:
    write_engines(tmp_path / "engines", bundle, **changes)
    with pytest.raises(ValueError, match=message):
        write_repository(bundle, tmp_path / "repository", OPTIONS, engines=tmp_path / "engines")
    assert only(tmp_path) == ["engines", "onnx"]


def test_a_changed_engine(tmp_path: Path, bundle: Bundle) -> None:
    write_engines(tmp_path / "engines", bundle)
    for engine in (tmp_path / "engines").glob("*.engine"):
        engine.write_bytes(b"another")
    with pytest.raises(ValueError, match=r"has changed since it was built"):
        write_repository(bundle, tmp_path / "repository", OPTIONS, engines=tmp_path / "engines")


def test_no_engines(tmp_path: Path, bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="holds no engine of transformer"):
        write_repository(bundle, tmp_path / "repository", OPTIONS, engines=tmp_path)
    with pytest.raises(ValueError, match="platform 'tensorrt' needs --engines"):
        write_repository(bundle, tmp_path / "repository", OPTIONS)
