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
from onnx import TensorProto, helper
from tiny import NAMES, tiny_dit, tiny_vae

from dit_engine.io.directories import new_directory
from dit_export.backends.onnxruntime import OnnxRuntimeBackend
from dit_export.bundle import MANIFEST, Bundle, Graph, write_manifest
from dit_export.onnx.files import check_contained
from dit_export.onnx.graphs import signature
from dit_export.server.repository import write_repository
from dit_export.source import weights_hash
from dit_export.targets import GRAPHS
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
MODEL, VAE = tiny_dit(), tiny_vae()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "shadow"
    path.write_text(SECRET)
    return path


def model_of(name: str, change: Callable[[Any], None] = lambda _: None) -> bytes:
    """An ONNX file with the metadata of an export's graph and without nodes."""
    model = helper.make_model(helper.make_graph([], name, [], []))
    weights = weights_hash(VAE if name == "vae_decoder" else MODEL)
    helper.set_model_props(model, {"graph": name, "checkpoint": weights, "dtype": "fp32"})
    change(model)
    return model.SerializeToString()


def write(
    path: Path, files: dict[str, bytes] | None = None, lay: Callable[[Path], None] = lambda _: None
) -> Path:
    """An export; files: beside or in place of its graphs; lay: what comes before the manifest."""
    facts = {
        "model": MODEL.config.to_dict(), "vae": json.loads(VAE.config.to_json()),
        "checkpoint": weights_hash(MODEL), "vae_checkpoint": weights_hash(VAE), "dtype": "fp32",
        "opset": 23, "target": "tensorrt", "guided_channels": 3, "label_names": [*NAMES],
    }  # fmt: skip
    content = {f"{name}.onnx": model_of(name) for name in GRAPHS} | (files or {})
    graphs = [
        Graph(n, f"{n}.onnx", "fp32", *signature(n, MODEL.config, VAE.config)) for n in GRAPHS
    ]
    with new_directory(path) as partial:
        for name, data in content.items():
            (partial / name).write_bytes(data)
        lay(partial)
        write_manifest(partial, facts, graphs)
    return path


def held(repository: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in repository.rglob("*") if p.is_file()}


def test_a_link_that_no_manifest_lists_is_not_copied(tmp_path: Path, secret: Path) -> None:
    path = write(tmp_path / "onnx")
    for name in ("transformer.onnx.data", "guided_step.onnx.data", "labels.json"):
        (path / name).symlink_to(secret)
    (path / "vae_decoder.onnx.data").write_text(SECRET)  # nor what was put there by hand
    repository = write_repository(Bundle.open(path), tmp_path / "repository")
    assert not [name for name, data in held(repository).items() if SECRET.encode() in data]
    assert not list(repository.rglob("*.data"))


@pytest.mark.parametrize("name", ["transformer.onnx", "transformer.onnx.data", "labels.json"])
def test_a_link_that_the_manifest_lists_is_refused(tmp_path: Path, secret: Path, name: str) -> None:
    def lay(partial: Path) -> None:
        content = (partial / name).read_bytes() if (partial / name).exists() else SECRET.encode()
        secret.write_bytes(content)
        (partial / name).unlink(missing_ok=True)
        (partial / name).symlink_to(secret)

    path = write(tmp_path / "onnx", lay=lay)
    with pytest.raises(ValueError, match=f"{name}: is a link, and only regular files are accepted"):
        Bundle.open(path)
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


@pytest.mark.parametrize("name", ["../transformer.onnx", "docs/thesis.tex", "thesis.tex", ".", ""])
def test_names_that_no_export_has_are_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "onnx")
    manifest = json.loads((path / MANIFEST).read_text())
    sha256 = hashlib.sha256(b"").hexdigest()
    changed = manifest["files"] | {name: {"bytes": 0, "sha256": sha256}}
    (path / MANIFEST).write_text(json.dumps(manifest | {"files": changed}))
    with pytest.raises(ValueError, match=r"not a file name|not a file of an export"):
        Bundle.open(path)
    manifest["graphs"]["denoiser"]["file"] = name
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"not file name|of graph 'denoiser'"):
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


HOSTILE: dict[str, Callable[[Any], object]] = {
    "absolute": lambda m: m.graph.initializer.append(tensor("/etc/shadow")),
    "upwards": lambda m: m.graph.initializer.append(tensor("../shadow")),
    "another file": lambda m: m.graph.initializer.append(tensor("vae_decoder.onnx")),
    "memory": lambda m: m.graph.initializer.append(tensor("*/_ORT_MEM_ADDR_/*")),
    "its own weights, which nothing lists": lambda m: m.graph.initializer.append(
        tensor("transformer.onnx.data")
    ),
    "two places": lambda m: m.graph.initializer.append(tensor("transformer.onnx.data", "/etc/x")),
    "no place": lambda m: m.graph.initializer.append(tensor()),
    "not marked": lambda m: m.graph.initializer.append(tensor("/etc/shadow", marked=False)),
    "sparse": lambda m: m.graph.sparse_initializer.append(sparse(tensor("/etc/shadow"))),
    "attribute": lambda m: m.graph.node.append(
        helper.make_node("Constant", [], ["c"], value=tensor("/etc/shadow"))
    ),
    "sparse attribute": lambda m: m.graph.node.append(
        helper.make_node("Constant", [], ["c"], sparse_value=sparse(tensor("/etc/shadow")))
    ),
    "subgraphs": lambda m: m.graph.node.add(op_type="Loop").attribute.append(
        nested(tensor("/etc/shadow"))
    ),
    "function": lambda m: m.functions.add(name="f", domain="x").node.append(
        helper.make_node("Constant", [], ["c"], value=tensor("/etc/shadow"))
    ),
    "training": lambda m: m.training_info.add().algorithm.initializer.append(tensor("/etc/x")),
    "a runtime's operator": lambda m: m.graph.node.append(
        helper.make_node("EPContext", [], ["c"], domain="com.microsoft", ep_cache_context="/a.so")
    ),
    "a plugin": lambda m: m.graph.node.append(helper.make_node("x", [], ["c"], domain="dit")),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_graph_that_reads_other_files_is_refused(tmp_path: Path, secret: Path, kind: str) -> None:
    def change(model: Any) -> None:
        HOSTILE[kind](model)

    names = ("transformer", "denoiser")
    path = write(tmp_path / "onnx", {f"{n}.onnx": model_of(n, change) for n in names})
    (path / "transformer.onnx.data").symlink_to(secret)
    bundle, cpu = Bundle.open(path), torch.device("cpu")
    message = r"onnx: (tensor|operator|holds functions|transformer\.onnx\.data)"
    with pytest.raises(ValueError, match=message):
        write_repository(bundle, tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        OnnxRuntimeBackend(MODEL, "fp32", cpu, str(path))
    options = BuildOptions(parse_profiles(["1"]))
    with pytest.raises(ValueError, match=message):
        build_bundle(bundle, tmp_path / "out", None, options, ("denoiser",))  # pyright: ignore[reportArgumentType]
    if "nothing lists" not in kind:
        with pytest.raises(ValueError, match=message):
            check_contained(path / "transformer.onnx")
    assert not (tmp_path / "out").exists()


def test_weights_beside_a_graph_are_a_regular_file(tmp_path: Path, secret: Path) -> None:
    def change(model: Any) -> None:
        model.graph.initializer.append(tensor("denoiser.onnx.data"))

    path = write(
        tmp_path / "onnx",
        {"denoiser.onnx": model_of("denoiser", change), "denoiser.onnx.data": b"1234"},
    )
    check_contained(path / "denoiser.onnx")
    (path / "denoiser.onnx.data").unlink()
    with pytest.raises(ValueError, match=r"denoiser\.onnx\.data: is missing"):
        check_contained(path / "denoiser.onnx")
    (path / "denoiser.onnx.data").symlink_to(secret)
    with pytest.raises(ValueError, match=r"denoiser\.onnx\.data: is a link"):
        check_contained(path / "denoiser.onnx")


@pytest.mark.parametrize("linked", ["engine", "description"])
def test_an_engine_is_a_regular_file(tmp_path: Path, secret: Path, linked: str) -> None:
    key = EngineKey("graph", "tensorrt", "10.9", "any", parse_profiles(["1"]))
    made = EngineFile(tmp_path / "denoiser-1.engine", "denoiser", "", "fp16", key, {}, {}, "", 0)
    made = write_engine(made, SECRET.encode())
    path = made.path if linked == "engine" else made.description
    path.rename(secret)
    path.symlink_to(secret)
    with pytest.raises(EngineRefused, match=f"{path.name}: is a link"):
        find_engines(tmp_path, "denoiser")
