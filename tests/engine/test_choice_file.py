"""The file that stores measured times of kernels for later processes."""

from __future__ import annotations

import json
import multiprocessing
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from dit_engine._version import __version__
from dit_engine.backends.lean import choice_file
from dit_engine.backends.lean.choice_file import ChoiceFile, driver, remembered
from dit_kernels.chooser import Times

CUDA = torch.device("cuda")
FACTS = {"device": "NVIDIA H200", "driver": "580.65", "torch": "2.11.0+cu130", "triton": "3.6.0"}
TIMES: Times = {"library": 1.25, "128x256": 0.75, "128x192": None}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIT_ENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choice_file, "facts", lambda _: FACTS)
    return tmp_path / "cache"


def file_of(cache: Path) -> Path:
    return cache / "choices" / "nvidia-h200.json"


def quiet() -> ChoiceFile:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ChoiceFile(CUDA)


def write(first: int) -> None:
    """Runs in another process."""
    with patch.object(choice_file, "facts", lambda _: FACTS):
        file = ChoiceFile(CUDA)
        for i in range(first, first + 20):
            file.remember(f"key {i}", TIMES)


@pytest.mark.slow
def test_processes_that_write_at_once_lose_nothing() -> None:
    before = quiet()
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(write, (0, 100)))
    before.remember("mine", TIMES)
    after = quiet()
    keys = [f"key {i}" for first in (0, 100) for i in range(first, first + 20)]
    assert all(after.recall(key) == TIMES for key in [*keys, "mine"])
    assert (
        remembered() == {"NVIDIA H200": dict.fromkeys([*keys, "mine"], TIMES)}
        or len(remembered()["NVIDIA H200"]) == len(keys) + 1
    )


def test_the_order_of_candidates_is_kept(cache: Path) -> None:
    """The first candidate is the default, so its place matters."""
    assert remembered() == {}
    quiet().remember("fc1", TIMES)
    read = quiet().recall("fc1")
    assert read is not None and list(read.items()) == list(TIMES.items())
    assert quiet().recall("fc2") is None
    assert file_of(cache).parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("fact", FACTS)
def test_times_of_another_device_or_version_are_ignored(
    fact: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet().remember("fc1", TIMES)
    changed = FACTS | {fact: "NVIDIA H200 NVL" if fact == "device" else "9.9"}
    monkeypatch.setattr(choice_file, "facts", lambda _: changed)
    if fact == "device":
        other = quiet()
    else:
        said = (
            rf"^{file_of(cache)}: measured with {fact} .* is now 9.9; kernels are measured again$"
        )
        with pytest.warns(UserWarning, match=said):
            other = ChoiceFile(CUDA)
    assert other.recall("fc1") is None
    other.remember("qkv", TIMES)
    assert quiet().recall("qkv") == TIMES and quiet().recall("fc1") is None


HELD = {"facts": FACTS, "times": {"fc1": TIMES}}
BROKEN: dict[str, str] = {
    "empty": "",
    "truncated": json.dumps(HELD)[:-9],
    "no JSON": "\x89PNG",
    "no object": "[1]",
    "another file": json.dumps({"version": 1}),
    "text for times": json.dumps(HELD | {"times": {"fc1": "quick"}}),
    "text for a time": json.dumps(HELD | {"times": {"fc1": {"library": "1.0"}}}),
    "a time of 0": json.dumps(HELD | {"times": {"fc1": {"library": 0}}}),
    "an infinite time": json.dumps(HELD | {"times": {"fc1": {"library": float("inf")}}}),
    "a true time": json.dumps(HELD | {"times": {"fc1": {"library": True}}}),
    "control characters": json.dumps(HELD | {"times": {"fc1": {"\x1b[31m": 1.0}}}),
    "numbers for facts": json.dumps(HELD | {"facts": FACTS | {"torch": 2.11}}),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_ignored_with_one_line_and_replaced(kind: str, cache: Path) -> None:
    quiet().remember("fc1", TIMES)
    file_of(cache).write_text(BROKEN[kind], encoding="latin-1")
    assert remembered() == {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        file = ChoiceFile(CUDA)
    (message,) = (str(each.message) for each in told)
    assert str(file_of(cache)) in message and message.endswith("; kernels are measured again")
    assert message.isprintable()
    assert file.recall("fc1") is None
    file.remember("qkv", TIMES)
    assert quiet().recall("qkv") == TIMES


def test_a_folder_that_cannot_be_written_gives_one_warning(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("no directory")
    with pytest.warns(UserWarning, match=r"^kernel times are not stored: .* is not a directory"):
        file = ChoiceFile(CUDA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file.remember("fc1", TIMES)
    assert file.recall("fc1") == TIMES  # in this process
    cache.unlink()
    file = quiet()
    file_of(cache).mkdir()  # root may write in a directory of any mode, but not over another
    with pytest.warns(UserWarning, match=r"^kernel times are not stored: .*nvidia-h200\.json"):
        file.remember("fc1", TIMES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file.remember("fc2", TIMES)
    assert file.recall("fc1") == file.recall("fc2") == TIMES


def test_a_link_is_replaced_and_its_target_stays(cache: Path, tmp_path: Path) -> None:
    quiet()
    target = tmp_path / "precious"
    target.write_text(json.dumps(HELD))
    file_of(cache).symlink_to(target)
    quiet().remember("qkv", TIMES)
    assert target.read_text() == json.dumps(HELD) and not file_of(cache).is_symlink()


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Re", "580.65.06"),
        ("something else", "unknown"),
        (None, "unknown"),
    ],
)  # fmt: skip
def test_the_drivers_version(
    said: str | None, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "version"
    if said is not None:
        place.write_text(said)
    monkeypatch.setattr(choice_file, "_DRIVER", place)
    assert driver() == version


def test_the_facts_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"name of {device}")
    monkeypatch.setattr(choice_file, "driver", lambda: "580.65")
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.6.0"))
    found = choice_file.facts(torch.device("cuda:1"))
    known = {"torch": torch.__version__, "triton": "3.6.0", "dit_engine": __version__}
    assert found == {"device": "name of cuda:1", "driver": "580.65", **known}
