"""Of strangers' exports and engines, only regular files that they list are read and copied."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from bundles import write_bundle
from onnx import TensorProto, helper
from tiny import tiny_dit

from dit_export.backends.onnxruntime import OnnxRuntimeBackend
from dit_export.bundle import MANIFEST, Bundle
from dit_export.onnx.files import check_contained
from dit_export.server.repository import write_repository
from dit_export.tensorrt.build import BuildOptions, build_bundle
from dit_export.tensorrt.engine_files import (
    EngineFile,
    EngineKey,
    EngineRefused,
    find_engines,
    write_engine,
)
from dit_export.tensorrt.profiles import parse_profiles

SECRET = "root:secret"
MODEL = tiny_dit()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "shadow"
    path.write_text(SECRET)
    return path


def write(path: Path, lay: Callable[[Path], object] = lambda _: None) -> Path:
    """An export; lay: puts files into it before the manifest lists them."""
    return write_bundle(path, model=MODEL, dtype="fp32", target="tensorrt", lay=lay).path


def test_a_link_that_no_manifest_lists_is_not_copied(tmp_path: Path, secret: Path) -> None:
    path = write(tmp_path / "onnx")
    for name in ("transformer.onnx.data", "guided_step.onnx.data", "labels.json"):
        (path / name).symlink_to(secret)
    (path / "vae_decoder.onnx.data").write_text(SECRET)  # nor what was put there by hand
    repository = write_repository(Bundle.open(path), tmp_path / "repository")
    files = [p for p in repository.rglob("*") if p.is_file()]
    assert files and not [
        p for p in files if p.suffix == ".data" or SECRET.encode() in p.read_bytes()
    ]


@pytest.mark.parametrize("name", ["transformer.onnx", "transformer.onnx.data"])
def test_a_link_that_the_manifest_lists_is_refused(tmp_path: Path, secret: Path, name: str) -> None:
    def lay(partial: Path) -> None:
        content = (partial / name).read_bytes() if (partial / name).exists() else SECRET.encode()
        secret.write_bytes(content)
        (partial / name).unlink(missing_ok=True)
        (partial / name).symlink_to(secret)

    path = tmp_path / "onnx"
    with pytest.raises(ValueError, match=f"{name}: is a link, and only regular files are accepted"):
        write(path, lay)
    (path / name).unlink()
    (path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name}: is not a regular file"):
        Bundle.open(path)


def test_a_file_that_becomes_a_link_is_not_copied(
    tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(write(tmp_path / "onnx"))
    copyfile = shutil.copyfile
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", lambda _, target: copyfile(secret, target))
        with pytest.raises(ValueError, match="has changed since it was checked"):
            write_repository(bundle, tmp_path / "repository")
    bundle.file("transformer").unlink()
    bundle.file("transformer").symlink_to(secret)
    with pytest.raises(ValueError, match="is a link"):
        write_repository(bundle, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_names_that_no_export_has_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "onnx")
    before, empty = json.loads((path / MANIFEST).read_text()), hashlib.sha256(b"").hexdigest()
    files = before["files"] | {"thesis.tex": {"bytes": 0, "sha256": empty}}
    graph = before["graphs"]["denoiser"] | {"file": "../transformer.onnx"}
    for change, said in (
        ({"files": files}, "not a file( name| of an export)"),
        ({"graphs": before["graphs"] | {"denoiser": graph}}, "not file name"),
    ):
        (path / MANIFEST).write_text(json.dumps(before | change))
        with pytest.raises(ValueError, match=said):
            Bundle.open(path)


def tensor(*places: str, marked: bool = True) -> TensorProto:
    made = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1])
    if marked:
        made.data_location = TensorProto.EXTERNAL
    for place in places:
        made.external_data.add(key="location", value=place)
    return made


def nested(made: TensorProto) -> onnx.AttributeProto:
    constant = helper.make_node("Constant", [], ["c"], value=made)
    inner = helper.make_graph([constant], "inner", [], [])
    branch = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    return helper.make_attribute("body", helper.make_graph([branch], "outer", [], []))


def sparse(made: TensorProto) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=made, dims=[1])


def weights(*places: str, marked: bool = True) -> Callable[[Any], object]:
    return lambda m: m.graph.initializer.append(tensor(*places, marked=marked))


def node(*arguments: Any, **attributes: Any) -> Callable[[Any], object]:
    return lambda m: m.graph.node.append(helper.make_node(*arguments, **attributes))


SHADOW = tensor("/etc/shadow")
HOSTILE: dict[str, Callable[[Any], object]] = {
    "absolute": weights("/etc/shadow"),
    "upwards": weights("../shadow"),
    "another file": weights("vae_decoder.onnx"),
    "two places": weights("transformer.onnx.data", "/etc/x"),
    "no place": weights(),
    "not marked": weights("/etc/shadow", marked=False),
    "sparse": lambda m: m.graph.sparse_initializer.append(sparse(SHADOW)),
    "attribute": node("Constant", [], ["c"], value=SHADOW),
    "sparse attribute": node("Constant", [], ["c"], sparse_value=sparse(SHADOW)),
    "subgraphs": lambda m: m.graph.node.add(op_type="Loop").attribute.append(nested(SHADOW)),
    "function": lambda m: m.functions.add(name="f", domain="x"),
    "training": lambda m: m.training_info.add().algorithm.initializer.append(SHADOW),
    "a runtime's operator": node("EPContext", [], ["c"], domain="com.microsoft"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_graph_that_reads_other_files_is_refused(tmp_path: Path, kind: str) -> None:
    model = helper.make_model(helper.make_graph([], "g", [], []))
    HOSTILE[kind](model)
    (tmp_path / "transformer.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "transformer.onnx.data").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"onnx: (tensor|operator|holds functions)"):
        check_contained(tmp_path / "transformer.onnx")


@pytest.mark.parametrize("laid", ["nothing", "a link"])
def test_weights_that_no_manifest_lists_are_not_read(
    tmp_path: Path, secret: Path, laid: str
) -> None:
    def lay(partial: Path) -> None:
        for name in ("transformer", "denoiser"):
            model = onnx.load_model(partial / f"{name}.onnx", load_external_data=False)
            weights(f"{name}.onnx.data")(model)
            (partial / f"{name}.onnx").write_bytes(model.SerializeToString())

    path = write(tmp_path / "onnx", lay)
    for name in ("transformer", "denoiser"):
        if laid == "a link":
            (path / f"{name}.onnx.data").symlink_to(secret)
        with pytest.raises(ValueError, match=rf"{name}\.onnx\.data: is (a link|missing)"):
            check_contained(path / f"{name}.onnx")
    bundle, message = Bundle.open(path), r"onnx: (tensor|transformer\.onnx\.data)"
    with pytest.raises(ValueError, match=message):
        write_repository(bundle, tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        OnnxRuntimeBackend(MODEL, "fp32", torch.device("cpu"), str(path))
    options = BuildOptions(parse_profiles(["1"]))
    with pytest.raises(ValueError, match=message):
        build_bundle(bundle, tmp_path / "out", None, options, ("denoiser",))  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("linked", ["engine", "description"])
def test_an_engine_is_a_regular_file(tmp_path: Path, secret: Path, linked: str) -> None:
    key = EngineKey("graph", "tensorrt", "10.9", "any", parse_profiles(["1"]))
    made = EngineFile(tmp_path / "denoiser-1.engine", "denoiser", "", "fp16", key)
    made = write_engine(made, SECRET.encode())
    path = made.path if linked == "engine" else made.description
    path.rename(secret)
    path.symlink_to(secret)
    with pytest.raises(EngineRefused, match=rf"{path.name}: (cannot be read: )?.*is a link"):
        find_engines(tmp_path, "denoiser")
