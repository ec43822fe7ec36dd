"""Engine files on disk, whatever is in them: no TensorRT is needed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dit_export.tensorrt import engine_files
from dit_export.tensorrt.engine_files import (
    EngineFile,
    EngineKey,
    EngineRefused,
    find_engines,
    read_description,
    write_engine,
)
from dit_export.tensorrt.profiles import parse_profiles

KEY = EngineKey("graph", "tensorrt", "10.9", "any", parse_profiles(["1"]))


def test_an_engine_of_another_format_does_not_hide_ours(tmp_path: Path):
    ours, theirs = (
        write_engine(EngineFile(tmp_path / name, "a", "", "fp16", KEY, {}, {}, "", 0), b"engine")
        for name in ("a-1.engine", "a-2.engine")
    )
    text = theirs.description.read_text()
    theirs.description.write_text(text.replace('"format": 2', '"format": 1'))
    assert find_engines(tmp_path, "a") == [ours]
    ours.description.unlink()
    with pytest.raises(EngineRefused, match="format 1; 2 is what is read"):
        find_engines(tmp_path, "a")


def test_two_that_write_the_same_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first is held up between its engine and its description; the second comes meanwhile."""
    engine = EngineFile(tmp_path / "a.engine", "a", "weights", "fp16", KEY, {}, {}, "", 0)
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
