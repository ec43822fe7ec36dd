"""Profiles and engine files: how they are written, chosen and refused. No TensorRT is needed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

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
from dit_export.tensorrt.installed import CudaDevice
from dit_export.tensorrt.profiles import Profile, Range, choose_profile, parse_profiles

H200 = CudaDevice("NVIDIA H200", "9.0")
KEY = EngineKey("0" * 64, "rtx", "1.7.1.116", "any", parse_profiles(["1,2,8"], "8"))


@pytest.mark.parametrize("text", ["", "1,8", "1,2,3,4", "a,b,c", "1.5", "0,1,2", "2,1,8", "1,9,8"])
def test_a_bad_range_is_named(text: str):
    with pytest.raises(ValueError, match="batch ") as caught:
        parse_profiles([text])
    assert repr(text) in str(caught.value) and "\n" not in str(caught.value)


def test_profiles():
    assert Range.parse("1,2,8") == Range(1, 2, 8) and Range.parse("4") == Range(4, 4, 4)
    (fixed,), (free,) = parse_profiles(["1,2,8"]), parse_profiles(["1,2,8"], "8,32,64")
    assert fixed.shapes((-1, 4, 16, 16)) == ((1, 4, 16, 16), (2, 4, 16, 16), (8, 4, 16, 16))
    assert fixed.shapes((-1,)) == ((1,), (2,), (8,))
    assert free.shapes((-1, 4, -1, -1)) == ((1, 4, 8, 8), (2, 4, 32, 32), (8, 4, 64, 64))
    for profile in (fixed, free):
        assert Profile.from_dict(profile.to_dict()) == profile
    with pytest.raises(ValueError, match="needs a profile with a size"):
        fixed.shapes((-1, 4, -1, -1))
    with pytest.raises(ValueError, match="given twice"):
        parse_profiles(["1,2,8", "1,2,8"])
    with pytest.raises(ValueError, match="at least one"):
        parse_profiles([])


def test_the_narrowest_profile_that_holds_is_taken():
    profiles = parse_profiles(["1,2,64", "1,1,2", "16,32,64"])
    assert [choose_profile(profiles, n) for n in (1, 2, 3, 16, 64)] == [1, 1, 0, 2, 2]
    sized = parse_profiles(["1,2,8"], "8,32,64")
    assert choose_profile(sized, 2, (8, 64)) == 0
    two = parse_profiles(["1,2,8", "16"])
    for profiles, batch, size, reason in (
        (two, 9, (), "batch 9 is outside .*: batch 1 to 8 .best at 2.; batch 16$"),
        (sized, 2, (8, 65), "batch 2 of 8×65 is outside .*, size 8 to 64 .best at 32.$"),
    ):
        with pytest.raises(ValueError, match=reason):
            choose_profile(profiles, batch, size)


@pytest.fixture
def engine(tmp_path: Path) -> EngineFile:
    made = EngineFile(engine_path(tmp_path, "a", KEY), "a", "weights", "fp16", KEY,
                      {"x": (-1, 4)}, {"y": (-1,)}, "", 0, {"depth": 1})  # fmt: skip
    return write_engine(made, b"engine" * 100)


def flip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"E")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "truncated, 500 bytes in place"),
        (flip, "has changed since it was built"),
        (Path.unlink, "is missing"),
    ],
)
def test_a_damaged_engine_is_refused(
    engine: EngineFile, damage: Callable[[Path], object], reason: str
):
    assert engine.read() == b"engine" * 100 and read_description(engine.path) == engine
    damage(engine.path)
    with pytest.raises(EngineRefused, match=rf"{reason}.*--rebuild") as caught:
        engine.read()
    assert "\n" not in str(caught.value)


def test_an_engine_of_another_version_or_device_is_refused(engine: EngineFile):
    def of(target: str) -> EngineFile:
        return replace(engine, key=replace(KEY, target=target))

    for target in ("any", "9.0", "8.9 9.0", "NVIDIA H200 (9.0)"):
        of(target).check("rtx", KEY.version, H200)
    for target in ("8.9 12.0", "NVIDIA H100 (9.0)"):
        with pytest.raises(EngineRefused, match=r"built for .*, this is NVIDIA H200 \(9\.0\)"):
            of(target).check("rtx", KEY.version, H200)
    for here in (("rtx", "1.8"), ("tensorrt", KEY.version)):
        with pytest.raises(EngineRefused, match=rf"built by TensorRT rtx .*, this is {here[0]} "):
            engine.check(*here)


def test_every_part_of_the_key_makes_another_file():
    changes = {
        "graph": "1" * 64, "flavour": "tensorrt", "version": "1.8", "target": "8.9",
        "profiles": parse_profiles(["1,2,9"], "8"), "workspace_bytes": 1, "plugins": ("a",),
    }  # fmt: skip
    digests = {replace(KEY, **{name: value}).digest for name, value in changes.items()}
    assert len(digests | {KEY.digest}) == 1 + len(changes)
    # Engines that earlier releases built are found: the digest is part of the file's name.
    assert KEY.digest == "bf39c9277e2519eb"


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (("b",), "holds no engine of b; see"),
        (("a", "0" * 64), "was built from another model's weights"),
        (("a", "weights", "bf16"), "is in fp16; precision 'bf16' is asked"),
        (("a", "weights", None, {"depth": 2}), "has these weights with another config"),
    ],
)
def test_engines_are_found_by_what_they_are(
    engine: EngineFile, asked: tuple[str, ...], reason: str
):
    assert find_engines(engine.path.parent, "a", "weights", "fp16", {"depth": 1}) == [engine]
    with pytest.raises(EngineRefused, match=reason):
        find_engines(engine.path.parent, *asked)


def test_a_description_that_cannot_be_read_does_not_hide_another_engine(
    engine: EngineFile, tmp_path: Path
):
    values = json.loads(engine.description.read_text())
    other = write_engine(replace(engine, path=tmp_path / "a-1.engine"), b"another")
    for text in ("{", "[]", json.dumps(values | {"format": 1}), json.dumps(values | {"key": {}})):
        other.description.write_text(text)
        with pytest.raises(EngineRefused, match=r"cannot be read: .* --rebuild"):
            read_description(other.path)
        assert find_engines(tmp_path, "a") == [engine]
    engine.description.unlink()
    with pytest.raises(EngineRefused, match="no engine of ours"):
        read_description(engine.path)
    with pytest.raises(EngineRefused, match="cannot be read"):
        find_engines(tmp_path, "a")


def test_a_write_that_fails_halfway_leaves_no_description(
    engine: EngineFile, monkeypatch: pytest.MonkeyPatch
):
    """Of an earlier engine with the same name, it would describe the new one wrongly."""

    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_engine(engine, b"another")
    with pytest.raises(EngineRefused, match="holds no engine of a; see"):
        find_engines(engine.path.parent, "a")


def test_two_that_write_the_same_engine(engine: EngineFile, monkeypatch: pytest.MonkeyPatch):
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
