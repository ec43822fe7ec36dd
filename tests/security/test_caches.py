"""A cache that others could write to is refused, and a hit is compared with the model."""

from __future__ import annotations

import json
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import tiny_dit

from dit_engine.io.caches import VARIABLE, cache_directory, private_cache, private_directory
from dit_engine.model import DiT
from dit_export import cache as cache_module
from dit_export.bundle import Bundle, Graph
from dit_export.cache import cached_export
from dit_export.onnx.export import ExportOptions
from dit_export.source import weights_hash
from dit_export.tensorrt.build import existing
from dit_export.tensorrt.engine_files import (
    EngineFile,
    EngineKey,
    EngineRefused,
    engine_path,
    write_engine,
)
from dit_export.tensorrt.profiles import parse_profiles

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners and modes here")
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
STRANGER = 12345


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0])
def test_what_is_made_is_for_this_user_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        made = private_directory(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    assert [mode(place) for place in (made, *made.parents[:2])] == [0o700] * 3


@pytest.mark.parametrize("wrong", [0o770, 0o702, 0o1777])
def test_a_directory_that_others_may_write_in_is_refused(tmp_path: Path, wrong: int) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(wrong)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/cache: .* write in .*mode {wrong:o}"):
        private_directory(tmp_path / "cache")


def test_a_directory_that_others_may_only_read_is_taken(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o755)
    assert private_directory(tmp_path / "cache") == tmp_path / "cache"
    assert mode(tmp_path / "cache") == 0o755


def test_a_directory_below_one_that_anyone_may_rename_in(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(ValueError, match=r"anyone may write in .*shared"):
        private_directory(shared / "cache")
    shared.chmod(0o1777)  # as /tmp
    assert mode(private_directory(shared / "cache")) == 0o700


@pytest.mark.skipif(not ROOT, reason="only root can give files away")
def test_what_belongs_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", STRANGER, -1)
    with pytest.raises(
        ValueError, match=rf"theirs: .* user {STRANGER}, .*; set {VARIABLE} to another"
    ):
        private_directory(tmp_path / "theirs")
    (tmp_path / "ours").mkdir(mode=0o700)
    for link in ("leaf", "folder"):
        (tmp_path / link).symlink_to("ours" if link == "leaf" else ".")
        os.chown(tmp_path / link, STRANGER, -1, follow_symlinks=False)
    for path in (tmp_path / "leaf", tmp_path / "folder" / "ours"):
        with pytest.raises(ValueError, match=f"user {STRANGER} made the link"):
            private_directory(path)


def test_links_of_the_user_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk" / "big").mkdir(parents=True)
    (tmp_path / "home").symlink_to("disk/../disk")
    (tmp_path / "disk" / "cache").symlink_to(tmp_path / "disk" / "big")
    assert private_directory(tmp_path / "home" / "cache" / "onnx").is_dir()
    assert (tmp_path / "disk" / "big" / "onnx").is_dir()
    (tmp_path / "disk" / "big").chmod(0o777)  # where the links lead counts
    with pytest.raises(ValueError, match=r"anyone may write in .*disk/big"):
        private_directory(tmp_path / "home" / "cache" / "onnx")


@pytest.mark.parametrize("kind", ["file", "dangling link", "loop"])
def test_anything_but_a_directory_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "cache"
    if kind == "file":
        path.touch()
    else:
        path.symlink_to("cache" if kind == "loop" else "nowhere")
    with pytest.raises(ValueError, match="is not a directory"):
        private_directory(path)


def test_every_directory_of_the_cache_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    assert private_cache("onnx") == cache_directory() / "onnx" == tmp_path / "cache" / "onnx"
    assert mode(tmp_path / "cache") == mode(tmp_path / "cache" / "onnx") == 0o700
    for place in (tmp_path / "cache" / "onnx", tmp_path / "cache"):
        place.chmod(0o770)
        with pytest.raises(
            ValueError, match=rf"^{place}: .*; run chmod go-w {place}, or set {VARIABLE} "
        ):
            private_cache("onnx")
        place.chmod(0o700)


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "home" / "cache"))

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    message = f"^{tmp_path}/home: Permission denied; set {VARIABLE} to a directory of yours$"
    with pytest.raises(PermissionError, match=message):
        private_cache("onnx")


def test_a_relative_cache_home_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert cache_directory() == Path.home() / ".cache" / "dit-engine"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "dit-engine"


def test_without_a_home_the_message_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    for name in (VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=f"Could not determine home directory. Set {VARIABLE}"):
        cache_directory()


OPTIONS = ExportOptions("fp32", graphs=("conditioner",))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "onnx"


def test_a_hit_is_compared_with_the_model(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = tiny_dit(), tiny_dit(seed=1)
    mine, theirs = (cached_export(m, OPTIONS).path for m in (model, other))
    assert mode(cache) == mode(mine) == mode(theirs) == 0o700
    shutil.copytree(mine, tmp_path / "kept")
    made = []

    def export(_: DiT, path: Path, *__: object, **___: object) -> Bundle:
        made.append(path)
        return Bundle.open(shutil.copytree(tmp_path / "kept", path))

    monkeypatch.setattr(cache_module, "export_onnx", export)  # which takes a second

    def swapped() -> None:  # a whole export of another model
        shutil.rmtree(mine)
        shutil.copytree(theirs, mine)

    def graph_alone() -> None:  # and the manifest is made to fit
        shutil.copy(theirs / "conditioner.onnx", mine)
        manifest = json.loads((mine / "manifest.json").read_text())
        other_files = json.loads((theirs / "manifest.json").read_text())["files"]
        manifest["files"]["conditioner.onnx"] = other_files["conditioner.onnx"]
        (mine / "manifest.json").write_text(json.dumps(manifest))

    def config_alone() -> None:
        manifest = json.loads((mine / "manifest.json").read_text())
        manifest["model"]["num_classes"] -= 1
        manifest["label_names"] = None
        (mine / "manifest.json").write_text(json.dumps(manifest))

    def writable() -> None:
        mine.chmod(0o770)

    def a_link() -> None:
        shutil.rmtree(mine)
        mine.symlink_to(theirs)

    for change in (swapped, graph_alone, config_alone, writable, a_link):
        change()
        for _ in range(2):
            assert cached_export(model, OPTIONS).checkpoint == weights_hash(model), change.__name__
            assert cached_export(other, OPTIONS).checkpoint == weights_hash(other)
        assert made.pop() == mine and not made, change.__name__
        assert mode(mine) == 0o700


def test_a_lock_that_is_a_link(cache: Path, tmp_path: Path) -> None:
    model, victim = tiny_dit(), tmp_path / "victim"
    private_cache("onnx")
    name = cache_module._key(model, OPTIONS)
    (cache / f"{name}.lock").symlink_to(victim)
    with pytest.raises(OSError, match="link"):
        cached_export(model, OPTIONS)
    assert not victim.exists()


def test_no_export_is_kept_where_others_may_write(cache: Path) -> None:
    cache.mkdir(parents=True, mode=0o700)
    cache.parent.chmod(0o777)
    with pytest.raises(ValueError, match=rf"^{cache.parent}: .* write in .*{VARIABLE}"):
        cached_export(tiny_dit(), OPTIONS)


def test_an_engine_of_another_model(tmp_path: Path) -> None:
    """The claims of the description are checked, although name and key fit."""
    graph = Graph("denoiser", "denoiser.onnx", "fp16", (), ())
    key = EngineKey("0" * 64, "rtx", "1.7", "any", parse_profiles(["1,2,8"]))
    model = tiny_dit().config.to_dict()
    path = engine_path(tmp_path, "denoiser", key)

    def found(claimed: dict[str, object], graph: Graph = graph) -> EngineFile | None:
        made = EngineFile(path, "denoiser", "a" * 64, "fp16", key, {}, {}, "", 0, model)
        write_engine(replace(made, **claimed), b"an engine")
        return existing(tmp_path, graph, "a" * 64, model, key)

    assert found({}) is not None
    assert found({"model": model | {"num_classes": 9}}) is None  # and is built for this config
    for claimed in ({"checkpoint": "b" * 64}, {"dtype": "fp32"}, {"graph": "conditioner"}):
        with pytest.raises(EngineRefused, match="describes another engine; build it again"):
            found(claimed)
