"""Caches that others could write to are not used, and a hit is compared with the model."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_dit
from torch._inductor import codecache
from torch._inductor.runtime import cache_dir_utils, runtime_utils

from dit_engine.backends import compile as compile_backend
from dit_engine.backends.compile import CACHE_VARIABLE as COMPILED
from dit_engine.backends.compile import use_private_cache
from dit_engine.io.caches import VARIABLE, cache_directory, private_cache, private_directory
from dit_engine.model import DiT
from dit_export import cache as cache_module
from dit_export.bundle import Bundle
from dit_export.cache import cached_export
from dit_export.onnx.export import ExportOptions
from dit_export.source import weights_hash
from dit_export.tensorrt.build import existing
from dit_export.tensorrt.engine_files import (
    EngineFile,
    EngineKey,
    engine_path,
    write_engine,
)
from dit_export.tensorrt.profiles import parse_profiles

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners and modes here")
STRANGER = 12345


def mode(path: str | Path) -> int:
    return stat.S_IMODE(Path(path).stat().st_mode)


def made(path: Path, mode: int = 0o700) -> Path:
    path.mkdir(parents=True)
    path.chmod(mode)
    return path


def test_a_directory_that_others_may_write_in_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each directory of the cache is looked at, also behind links of the user."""
    big = made(tmp_path / "disk" / "big")
    (tmp_path / "home").symlink_to("disk/../disk")
    (tmp_path / "disk" / "cache").symlink_to(big)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "home" / "cache"))
    onnx = private_cache("onnx")
    assert onnx == cache_directory() / "onnx" and (big / "onnx").is_dir() and mode(onnx) == 0o700
    for place, wrong, said in (
        (big / "onnx", 0o770, rf"others may .*mode 770.*; run chmod go-w .*, or set {VARIABLE} "),
        (big, 0o1777, "others may write in it"),
        (tmp_path / "disk", 0o777, r"anyone may write in .*disk "),
    ):
        before = mode(place)
        place.chmod(wrong)
        with pytest.raises(ValueError, match=said):
            private_cache("onnx")
        place.chmod(before)
    big.chmod(0o1777)  # as /tmp
    assert mode(private_directory(big / "below")) == 0o700
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="is not a directory"):
        private_directory(tmp_path / "loop")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root gives files away")
def test_what_belongs_to_others_is_refused(tmp_path: Path) -> None:
    os.chown(made(tmp_path / "theirs"), STRANGER, -1)
    said = rf"theirs: .* user {STRANGER}, .*; set {VARIABLE} to another"
    with pytest.raises(ValueError, match=said):
        private_directory(tmp_path / "theirs")
    made(tmp_path / "ours")
    for link, target, path in (("leaf", "ours", "leaf"), ("folder", ".", "folder/ours")):
        (tmp_path / link).symlink_to(target)
        os.chown(tmp_path / link, STRANGER, -1, follow_symlinks=False)
        with pytest.raises(ValueError, match=f"user {STRANGER} made the link"):
            private_directory(tmp_path / path)


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")  # relative, and so ignored
    assert cache_directory() == Path.home() / ".cache" / "dit-engine"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "dit-engine"
    (tmp_path / "file").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=f"Not a directory; set {VARIABLE} to a directory of yours$"):
        private_cache("onnx")
    monkeypatch.setenv(VARIABLE, "~nobody-of-this-name/cache")
    with pytest.raises(ValueError, match=f"home directory. Set {VARIABLE}"):
        cache_directory()


OPTIONS = ExportOptions("fp32", graphs=("conditioner",))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "onnx"


@pytest.mark.slow
def test_a_hit_is_compared_with_the_model(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = tiny_dit(), tiny_dit(seed=1)
    mine, theirs = (cached_export(m, OPTIONS).path for m in (model, other))
    assert mode(cache) == mode(mine) == mode(theirs) == 0o700
    shutil.copytree(mine, tmp_path / "kept")
    exported = []

    def export(_: DiT, path: Path, *__: object, **___: object) -> Bundle:
        exported.append(path)
        return Bundle.open(shutil.copytree(tmp_path / "kept", path))

    monkeypatch.setattr(cache_module, "export_onnx", export)  # which takes a second

    def swapped(*names: str) -> None:
        """The whole export of another model, or files of it."""
        shutil.rmtree(mine)
        shutil.copytree(tmp_path / "kept", mine)
        for path in theirs.iterdir():
            if path.name in names or not names:
                shutil.copy(path, mine)

    def graph_alone() -> None:  # and the manifest is made to fit
        swapped("conditioner.onnx")
        manifests = [json.loads((path / "manifest.json").read_text()) for path in (mine, theirs)]
        merged = manifests[0] | {"files": manifests[1]["files"]}
        (mine / "manifest.json").write_text(json.dumps(merged))

    def a_link() -> None:
        shutil.rmtree(mine)
        mine.symlink_to(theirs)

    for change in (swapped, graph_alone, lambda: mine.chmod(0o770), a_link):
        change()
        for _ in range(2):
            assert cached_export(model, OPTIONS).checkpoint == weights_hash(model)
        assert exported.pop() == mine and not exported and mode(mine) == 0o700
    assert cached_export(other, OPTIONS).checkpoint == weights_hash(other) and not exported
    cache.parent.chmod(0o777)  # where others could put one
    with pytest.raises(ValueError, match=rf"^{cache.parent}: .* write in .*{VARIABLE}"):
        cached_export(model, OPTIONS)


def test_an_engine_of_another_model(tmp_path: Path) -> None:
    """The claims of the description are checked, although name and key fit."""
    key = EngineKey("0" * 64, "rtx", "1.7", "any", parse_profiles(["1,2,8"]))
    model = tiny_dit().config.to_dict()
    path = engine_path(tmp_path, "denoiser", key)

    def found(**claimed: object) -> EngineFile | None:
        engine = EngineFile(path, "denoiser", "a" * 64, "fp16", key, model=model)
        write_engine(replace(engine, **claimed), b"an engine")
        return existing(engine)

    assert found() is not None
    assert found(model=model | {"num_classes": 9}) is None  # and is built for this config
    for claimed in ({"checkpoint": "b" * 64}, {"dtype": "fp32"}, {"graph": "conditioner"}):
        assert found(**claimed) is None


COMPILING = """
import os, sys
seen = []
usual = os.path.join(os.environ["TMPDIR"], "torchinductor_")
def watch(event, arguments):
    if event != "import" and any(str(a).startswith(usual) for a in arguments):
        seen.append((event, arguments))
sys.addaudithook(watch)

import torch
from dit_engine.backends.compile import compile_graph
run = compile_graph(lambda x, y: x @ y)  # which takes no C++ compiler
assert torch.equal(run(torch.eye(2), torch.eye(2)), torch.eye(2))
print(seen)
"""


@pytest.mark.slow
def test_a_compilation_uses_only_our_cache(tmp_path: Path) -> None:
    hostile = made(tmp_path / "tmp" / f"torchinductor_{getpass.getuser()}", 0o777)
    kept = {k: v for k, v in os.environ.items() if k not in (COMPILED, "TRITON_CACHE_DIR")}
    given = {"TMPDIR": str(hostile.parent), "DIT_ENGINE_CACHE": str(tmp_path / "cache"),
             "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", COMPILING], env=kept | given, timeout=100,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.stdout == "[]\n", done.stdout + done.stderr
    assert not list(hostile.iterdir())
    ours = tmp_path / "cache" / "inductor"
    assert mode(ours) == mode(ours.parent) == 0o700
    assert {"fxgraph", "aotautograd"} <= {p.name for p in ours.iterdir()}


def test_where_compiled_code_is_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In our cache, where the user says, or, without a private place, in a temporary one."""
    ours, chosen, usual = (str(tmp_path / n) for n in ("cache/inductor", "chosen", "usual"))
    modules: tuple[Any, ...] = (cache_dir_utils, runtime_utils, codecache)
    for module in modules:
        monkeypatch.setattr(module, "default_cache_dir", lambda: usual)
    for name in ("_HEADER_DIR", "_HEADER_LOCK_DIR"):
        monkeypatch.setattr(codecache, name, usual)
    monkeypatch.setenv(COMPILED, usual)  # torch writes it there as soon as it is imported

    def places() -> set[str]:
        """Where torch keeps what it compiled and its headers, and what it falls back to."""
        headers = Path(codecache._HEADER_DIR).parent, Path(codecache._HEADER_LOCK_DIR).parents[1]
        return {*map(str, headers), *(module.default_cache_dir() for module in modules)}

    use_private_cache()
    assert {*places(), os.environ[COMPILED]} == {ours}
    monkeypatch.setenv(COMPILED, chosen)
    use_private_cache()
    assert os.environ[COMPILED] == cache_dir_utils.cache_dir() == chosen and places() == {ours}
    monkeypatch.setenv(COMPILED, ours)
    cache.parent.chmod(0o777)
    for _ in range(2):
        with pytest.warns(UserWarning, match="kept only for this process: .*write in"):
            use_private_cache()
    temporary = Path(os.environ[COMPILED])
    assert temporary.is_dir() and mode(temporary) == 0o700 and tmp_path not in temporary.parents
    assert places() == {str(temporary)} == {compile_backend._temporary()}
