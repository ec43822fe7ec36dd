"""Profiles, engine files and installed packages. No TensorRT is needed."""

from __future__ import annotations

import importlib
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit_engine.errors import BackendUnavailable
from dit_export.tensorrt import engine_files
from dit_export.tensorrt.engine_files import (
    EngineFile,
    EngineKey,
    EngineRefused,
    engine_path,
    find_engines,
    read_description,
    write_engine,
)
from dit_export.tensorrt.installed import CudaDevice, choose_flavour, require_device
from dit_export.tensorrt.profiles import Range, choose_profile, parse_profiles

H200 = CudaDevice("NVIDIA H200", "9.0")
KEY = EngineKey("0" * 64, "rtx", "1.7.1.116", "any", parse_profiles(["1,2,8"], "8"))


@pytest.mark.parametrize("texts", [["1,8"], ["a,b,c"], ["0,1,2"], ["1,9,8"], ["1,2,8", "1,2,8"]])
def test_a_bad_range_is_named(texts: list[str]) -> None:
    with pytest.raises(ValueError, match=f"batch '?{texts[0]}"):
        parse_profiles(texts)


def test_profiles() -> None:
    assert Range.parse("4", "size") == Range(4, 4, 4)
    (fixed,), (free,) = parse_profiles(["1,2,8"]), parse_profiles(["1,2,8"], "8,32,64")
    assert fixed.shapes((-1, 4, 16, 16)) == ((1, 4, 16, 16), (2, 4, 16, 16), (8, 4, 16, 16))
    assert free.shapes((-1, 4, -1, -1)) == ((1, 4, 8, 8), (2, 4, 32, 32), (8, 4, 64, 64))


def test_the_narrowest_profile_that_holds_is_taken() -> None:
    profiles, inputs = parse_profiles(["1,2,64", "1,1,2", "16,32,64"]), {"x": (-1, 3), "t": (-1,)}

    def chosen(x: tuple[int, ...], t: tuple[int, ...]) -> int:
        return choose_profile(profiles, inputs, {"x": x, "t": t})

    assert [chosen((n, 3), (n,)) for n in (1, 2, 3, 16, 64)] == [1, 1, 0, 2, 2]
    sized, z = parse_profiles(["1,2,8"], "8,32,64"), {"z": (-1, 4, -1, -1)}
    assert choose_profile(sized, z, {"z": (2, 4, 8, 64)}) == 0
    for call in (
        lambda: chosen((65, 3), (65,)),
        lambda: chosen((2, 3), (3,)),
        lambda: chosen((2, 4), (2,)),
        lambda: chosen((2, 3), (2, 1)),
        lambda: choose_profile(profiles, inputs, {"x": (2, 3)}),
        lambda: choose_profile(sized, z, {"z": (2, 4, 8, 65)}),
    ):
        with pytest.raises(ValueError, match=r"do not fit the engine, which takes .* batch 1 to"):
            call()


@pytest.fixture
def engine(tmp_path: Path) -> EngineFile:
    path = engine_path(tmp_path, "a", KEY)
    made = EngineFile(path, "a", "weights", "fp16", KEY, model={"depth": 1})
    return write_engine(made, b"engine" * 100)


def test_a_damaged_engine_is_refused(engine: EngineFile) -> None:
    assert engine.read() == b"engine" * 100 and read_description(engine.path) == engine
    for content in (b"engine", b"Engine" * 100):  # the second has the same size
        engine.path.write_bytes(content)
        with pytest.raises(EngineRefused, match=r"has changed .*; build it again with dit-export"):
            engine.read()
    engine.path.unlink()
    with pytest.raises(EngineRefused, match="is missing"):
        engine.read()


def test_an_engine_of_another_version_or_device_is_refused(engine: EngineFile) -> None:
    def of(target: str) -> EngineFile:
        return replace(engine, key=replace(KEY, target=target))

    for target in ("any", "9.0", "8.9 9.0", "NVIDIA H200 (9.0)"):
        of(target).check("rtx", KEY.version, H200)
    for target in ("8.9 12.0", "NVIDIA H100 (9.0)"):
        with pytest.raises(EngineRefused, match=r"built for .*, this is NVIDIA H200 \(9\.0\)"):
            of(target).check("rtx", KEY.version, H200)
    for here in (("rtx", "1.8"), ("tensorrt", KEY.version)):
        with pytest.raises(EngineRefused, match=rf"built by TensorRT rtx .*, this is {here[0]} "):
            engine.check(*here, H200)


def test_every_part_of_the_key_makes_another_file() -> None:
    changes = {
        "graph": "1" * 64, "flavour": "tensorrt", "version": "1.8", "target": "8.9",
        "profiles": parse_profiles(["1,2,9"], "8"), "workspace_bytes": 1,
    }  # fmt: skip
    digests = {replace(KEY, **{name: value}).digest for name, value in changes.items()}
    assert len(digests | {KEY.digest}) == 1 + len(changes)
    # Engines that earlier releases built are found: the digest is part of the file's name.
    assert KEY.digest == "bf39c9277e2519eb"


def test_engines_are_found_by_what_they_are(engine: EngineFile, tmp_path: Path) -> None:
    assert find_engines(tmp_path, "a", dtype="fp16", model={"depth": 1}) == [engine]
    with pytest.raises(EngineRefused, match="holds no engine of b; see"):
        find_engines(tmp_path, "b")
    for fact in ({"checkpoint": "0" * 64}, {"dtype": "bf16"}, {"model": {"depth": 2}}):
        with pytest.raises(EngineRefused, match="was built of another "):
            find_engines(tmp_path, "a", **fact)


def test_a_description_that_cannot_be_read_does_not_hide_another_engine(
    engine: EngineFile, tmp_path: Path
) -> None:
    values = json.loads(engine.description.read_text())
    other = write_engine(replace(engine, path=tmp_path / "a-1.engine"), b"another")
    plugin = values["key"] | {"plugins": ["adaln 1"]}
    for changes in ({"format": 1}, {"key": {}}, {"key": plugin}):
        other.description.write_text(json.dumps(values | changes))
        with pytest.raises(EngineRefused, match=r"cannot be read: .* build it again"):
            read_description(other.path)
        assert find_engines(tmp_path, "a") == [engine]
    engine.description.unlink()
    with pytest.raises(EngineRefused, match="no engine of ours"):
        read_description(engine.path)


def test_a_write_that_fails_halfway_leaves_no_description(
    engine: EngineFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an earlier engine with the same name, it would describe the new one wrongly."""

    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_engine(engine, b"another")
    with pytest.raises(EngineRefused, match="holds no engine of a; see"):
        find_engines(engine.path.parent, "a")


def test_two_that_write_the_same_engine(
    engine: EngineFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is held up between its engine and its description; the second comes meanwhile."""
    halfway, second = threading.Event(), threading.Event()
    original = engine_files.atomic_path

    def atomic_path(path: Path):
        if path.suffix == ".json" and not halfway.is_set():
            halfway.set()
            second.wait(0.3)  # for ever, were it not for the lock
        return original(path)

    monkeypatch.setattr(engine_files, "atomic_path", atomic_path)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(write_engine, engine, b"the first")
        assert halfway.wait(10)
        later = pool.submit(write_engine, engine, b"the second")
        later.add_done_callback(lambda _: second.set())
        for task in (first, later):
            task.result(10)
    assert read_description(engine.path).read() == b"the second"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("__version__ = '10.13.2.6'", None),
        ("raise OSError('libnvinfer.so.11: not found')", r"libnvinfer\.so\.11: not found"),
        ("raise ModuleNotFoundError('No module')", r"\(No module\): pip .*dit-engine\[tensorrt\]"),
        ("__version__ = '8.6.1'", "tensorrt 8.6.1 is too old: 10 is needed"),
    ],
)
def test_which_tensorrt_is_here(
    code: str, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    importlib.invalidate_caches()
    try:
        if reason is None:  # "auto" prefers it
            assert str(choose_flavour()) == "TensorRT 10.13.2.6"
        else:
            with pytest.raises(ImportError, match=reason):
                choose_flavour("tensorrt")
    finally:
        sys.modules.pop("tensorrt", None)


def test_gpus_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert require_device(0) == H200
    with pytest.raises(BackendUnavailable, match="torch finds 1, and number 1 is asked for"):
        require_device(1)
