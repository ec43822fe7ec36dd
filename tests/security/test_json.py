"""Hostile JSON in all files that we read: accepted, or refused in one line without a traceback."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import operator
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny import NAMES, tiny_dit, tiny_vae

from dit_bench.report import VERSION, new_report, read
from dit_engine.checkpoint import load_checkpoint, save_pretrained
from dit_engine.cli.like import recorded_options
from dit_engine.errors import BackendUnavailable
from dit_engine.io import json_files
from dit_engine.io.json_files import (
    check_schema,
    is_file_name,
    parse_json,
    read_json,
    read_json_value,
)
from dit_engine.training.run import _begun
from dit_export import bundle as bundles
from dit_export.bundle import Bundle, Graph, TensorSpec, write_manifest
from dit_export.server.repository import read_marker
from dit_export.tensorrt.engine_files import EngineFile, EngineKey, find_engines, write_engine
from dit_export.tensorrt.installed import CudaDevice
from dit_export.tensorrt.profiles import parse_profiles

DEEP = "[" * 100_000


TEXTS: tuple[tuple[str | bytes, str], ...] = (
    (DEEP, "nested deeper than the 64 levels"), ('{"a":' * 65 + "1" + "}" * 65, "nested"),
    ('["\\"]", ' + "[" * 64, "nested"), ("[-Infinity]", "-Infinity is no"),
    ("1" + "0" * 400 + ".0", "is not finite"), ("18446744073709551616", "more than 64 bits"),
    ("9" * 5000, "more than 1000 digits"), ('{"\\udfff": 1}', "half of a surrogate pair"),
    (b"\xff", "not valid JSON"), ("{} {}", "line 1 column 4"), ("", "not valid"),
)  # fmt: skip


def test_texts_that_are_refused() -> None:
    for text, said in TEXTS:
        with pytest.raises(ValueError, match=said) as error:
            parse_json(text, "from afar")
        message = str(error.value)
        assert message.startswith("from afar: ") and "\n" not in message and len(message) < 300


def test_texts_that_are_taken() -> None:
    brackets = json.dumps(["[" * 1000, '\\"' + "{" * 1000, "\U0001f600", 2**64 - 1, -(2**63), 1.5])
    assert parse_json(brackets, "") == json.loads(brackets)
    assert parse_json("[" * 64 + "]" * 64, "") is not None
    lenient = parse_json('[-Infinity, "\\udcff", 1%s]' % ("0" * 300), "", lenient=True)
    assert lenient == [-float("inf"), "\udcff", 10**300]


def test_pipes_devices_and_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "device"):  # neither waits, nor reads without an end
        with pytest.raises(ValueError, match=f"{name} is not a regular file"):
            read_json(tmp_path / name)
    with pytest.raises(ValueError, match="more than the 16 MiB"):
        read_json_value(tmp_path / "device", pipe=True)
    with pytest.raises(IsADirectoryError, match="is a directory; a JSON file is needed"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist; a JSON file is needed"):
        read_json(tmp_path / "pipe" / "below")
    monkeypatch.setattr(json_files, "LIMIT_BYTES", 9)
    (tmp_path / "large").write_text("[1, 2, 3, 4]")
    with pytest.raises(ValueError, match="large: has more than"):
        read_json(tmp_path / "large")


def test_names_that_lead_elsewhere() -> None:
    for name in ("", ".", "..", "a/b", "a\\b", "C:a", "a\0", "a ", "x" * 300, "\x1b[2J", None):
        assert not is_file_name(name), name
    assert is_file_name("model-00001-of-2.onnx.data")


def test_a_schema_names_the_place() -> None:
    schema = {"": {"a": "object", "b?": "count[]?", "c?": ("x", 1)}, "a": {"<file name>": "list"},
              "d[]": {"e": "number|text"}, "f{}": {"g?": "bool"}}  # fmt: skip
    good = {"a": {}, "b": [1], "c": 1, "d": [{"e": 1.5}, {"e": "x"}]}
    check_schema(good, schema, "f")
    for change, said in (
        ({"a": {"../x": []}}, r"f: a has '\.\./x', which is not a file name"),
        ({"a": {"x": 1}}, r"f: a: 'x' is int, not list \(1\)"),
        ({"b": [-1]}, r"f: 'b' is list, not count\[\] \(\[-1\]\)"),
        ({"b": [True]}, "not count"), ({"c": True}, "'c' is True, not one of 'x', 1"),
        ({"d": [{}, {}]}, r"f: d\[0\] has no 'e'"), ({"d": {}}, "f: d is not a list"),
        ({"f": {"x": {"g": 1}}}, r"f: f\['x'\]: 'g' is int, not bool \(1\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            check_schema(good | change, schema, "f")


WRONG = [None, True, -1, 1.5, float("inf"), "", "x" * 5000, [], {}, [[]], [None], [[[[[[]]]]]],
         "\ud800", 10**30, 2**63, "../up", "a\nb\x1b[31m"]  # fmt: skip


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every value within, but of a list's entries only the first."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(min(1, len(value))):
            yield (*way, key)
            yield from places(value[key], (*way, key))


def changes(value: Any) -> Iterator[Any]:
    """All of `WRONG`, and ``value`` with each value within missing, or one of these in turn."""
    yield from WRONG
    turn = itertools.cycle([*WRONG, WRONG[0]])
    for *way, last in places(value):
        for wrong in (..., next(turn), next(turn)):
            changed = copy.deepcopy(value)
            at = functools.reduce(operator.getitem, way, changed)
            at[last] = wrong
            if wrong is ...:
                del at[last]
            yield changed


def survives(value: Any, path: Path, read: Callable[[], object]) -> None:
    """``read`` takes ``path`` with this value; anything else it takes, or refuses in one line."""
    path.write_text(json.dumps(value))
    read()
    for text in (*map(json.dumps, changes(value)), "{", DEEP):
        path.write_text(text)
        message = ""
        try:
            read()
        except UnicodeError:
            raise
        except (ValueError, OSError, BackendUnavailable) as error:
            message = str(error)
        assert len(message.splitlines()) < 2, (message, text[:300])


def test_manifests(tmp_path: Path) -> None:
    graph = Graph("denoiser", "denoiser.onnx", "fp32", (TensorSpec("x", "float32", ("batch", 4)),),
                  (TensorSpec("output", "float32", ("batch", 8)),),
                  {"against": "torch", "relative": 1e-6, "bound": 1e-5})  # fmt: skip
    facts = {
        "model": tiny_dit().config.to_dict(), "vae": json.loads(tiny_vae().config.to_json()),
        "checkpoint": "a", "vae_checkpoint": "b", "dtype": "fp32", "opset": 23,
        "target": "onnxruntime", "guided_channels": 3, "label_names": [*NAMES],
    }  # fmt: skip
    (tmp_path / "denoiser.onnx").write_bytes(b"weights")
    write_manifest(tmp_path, facts, [graph])
    path = tmp_path / "manifest.json"

    def read() -> None:
        bundle = Bundle.open(tmp_path)
        assert all(bundle.file(name).parent == tmp_path for name in bundle.graphs)
        assert set(bundles.replaceable(True)(tmp_path)) <= {path.name, "denoiser.onnx"}

    survives(json.loads(path.read_text()), path, read)


def test_engine_descriptions(tmp_path: Path) -> None:
    key = EngineKey("graph", "tensorrt", "10.9", "any", parse_profiles(["1,2,4"], "8"))
    made = EngineFile(tmp_path / "g-1.engine", "g", "weights", "fp16", key)
    engine = write_engine(made, b"engine")

    def read() -> None:
        for found in find_engines(tmp_path, "g", checkpoint="weights"):
            found.check("tensorrt", "10.9", CudaDevice("NVIDIA H200", "9.0"))
            assert hash(found.key) and [p.shapes((-1, 4)) for p in found.key.profiles]
            found.read()

    survives(json.loads(engine.description.read_text()), engine.description, read)


def test_repositories(tmp_path: Path) -> None:
    marker = {"format": 2, "producer": "dit-engine", "export": {}, "files": {"a/b": "0" * 64},
              "options": {"platform": "onnxruntime", "accelerator": "cuda", "max_batch_size": 4,
                          "instances": 1, "pipelines": 2, "queue_delay_us": 5, "queue_size": 9},
              }  # fmt: skip
    survives(marker, tmp_path / "repository.json", lambda: read_marker(tmp_path))


def test_pictures_and_runs(tmp_path: Path) -> None:
    record = {"model": "builtin", "numerics": "official", "version": "1", "sampler": "ddim",
              "steps": 2, "spacing": "linspace", "eta": 0.0, "guidance_channels": 3,
              "guidance_interval": [0.1, 1.0], "noise": "per-image", "precision": "fp32",
              "backend": "lean", "guidance_scale": 4.0, "label_name": "a", "label": 3, "seed": 5,
              "index": 0, "diffusion": {"prediction": "epsilon"}}  # fmt: skip
    path = tmp_path / "record.json"

    def use() -> None:
        info = PngInfo()
        info.add_text("dit_engine", path.read_text())
        Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=info)
        recorded_options(tmp_path / "a.png")

    survives(record, path, use)
    settings = {"class_names": ["a", "b"], "data": "avatars", "size": 64}
    survives(settings, path, lambda: _begun(path))


def test_measurements(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    point = {"section": "scaling", "case": "DiT", "contender": "5 steps", "status": "ok",
             "gmacs": 1.0, "steps": 5, "distance": 3.0, "n": 10}  # fmt: skip
    machine = {"cpu": "x", "device": "cpu", "threads": 1, "instruction_sets": [], "versions": {}}
    scaling = new_report("scaling", machine, {}) | {"rows": [point]}
    survives(scaling, path, lambda: read(path, "scaling"))
    for text in ("{", "[]", json.dumps({"schema": VERSION}), DEEP):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"r\.json is not a report of dit-bench: "):
            read(path)


def test_models(tmp_path: Path) -> None:
    model = tmp_path / "m"
    save_pretrained(model, tiny_dit(), tiny_vae(), NAMES)
    for name in ("config.json", "labels.json", "vae/config.json"):
        before = (model / name).read_text()
        survives(json.loads(before), model / name, lambda: load_checkpoint(model))
        (model / name).write_text(before)
    # Beyond float32 the arithmetic would raise OverflowError, after the model is loaded.
    for name, key, value in (
        ("config.json", "mlp_norm_eps", 1e308),
        ("config.json", "diffusion", {"clip": 1e39}),
        ("vae/config.json", "scaling_factor", 1e39),
        ("vae/config.json", "shift_factor", -1e39),
    ):
        before = (model / name).read_text()
        (model / name).write_text(json.dumps(json.loads(before) | {key: value}))
        with pytest.raises(ValueError, match=r"(is above 1|is not a finite number.*)$"):
            load_checkpoint(model)
        (model / name).write_text(before)
    (model / "model.safetensors").rename(model / "a.safetensors")
    weight_map = {next(iter(tiny_dit().state_dict())): "a.safetensors"}
    index = model / "model.safetensors.index.json"
    survives({"weight_map": weight_map}, index, lambda: load_checkpoint(model))
