"""torch's compiler neither reads nor writes in a temporary directory with a known name."""

from __future__ import annotations

import getpass
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch._inductor import codecache
from torch._inductor.runtime import cache_dir_utils, runtime_utils

from dit_engine.backends import compiler_cache
from dit_engine.backends.compiler_cache import VARIABLE, use_private_cache

COMPILING = """
import os, sys
from pathlib import Path
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


def mode(path: str | Path) -> int:
    return stat.S_IMODE(Path(path).stat().st_mode)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners and modes here")
def test_a_compilation_uses_only_our_cache(tmp_path: Path) -> None:
    hostile = tmp_path / "tmp" / f"torchinductor_{getpass.getuser()}"
    hostile.mkdir(parents=True)
    hostile.chmod(0o777)
    kept = {k: v for k, v in os.environ.items() if k not in (VARIABLE, "TRITON_CACHE_DIR")}
    given = {"TMPDIR": str(hostile.parent), "DIT_ENGINE_CACHE": str(tmp_path / "cache"),
             "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", COMPILING], env=kept | given, timeout=100,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.stdout == "[]\n", done.stdout + done.stderr
    assert not list(hostile.iterdir())
    ours = tmp_path / "cache" / "inductor"
    assert mode(ours) == mode(ours.parent) == 0o700
    assert {"fxgraph", "aotautograd"} <= {p.name for p in ours.iterdir()}


@pytest.fixture
def usual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """torch's default cache directory, with no other one chosen."""
    usual = str(tmp_path / "torchinductor_user")
    for module in (cache_dir_utils, runtime_utils, codecache):
        monkeypatch.setattr(module, "default_cache_dir", lambda: usual)
    monkeypatch.setattr(codecache, "_HEADER_DIR", f"{usual}/precompiled_headers")
    monkeypatch.setattr(codecache, "_HEADER_LOCK_DIR", f"{usual}/precompiled_headers/locks")
    monkeypatch.setenv("DIT_ENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(VARIABLE, usual)  # torch writes it there as soon as it is imported
    return usual


def places() -> list[Callable[[], str]]:
    modules = (cache_dir_utils, runtime_utils, codecache)
    headers = Path(codecache._HEADER_LOCK_DIR).parents[1]
    return [
        cache_dir_utils.cache_dir,
        lambda: str(headers),
        *(m.default_cache_dir for m in modules),
    ]


@pytest.mark.usefixtures("usual")
def test_the_default_of_torch_is_replaced(tmp_path: Path) -> None:
    use_private_cache()
    assert {place() for place in places()} == {str(tmp_path / "cache" / "inductor")}
    use_private_cache()
    assert os.environ[VARIABLE] == str(tmp_path / "cache" / "inductor")


def test_the_users_choice_stays(
    tmp_path: Path, usual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "chosen"))
    use_private_cache()
    chosen, *others = places()
    assert chosen() == os.environ[VARIABLE] == str(tmp_path / "chosen")
    assert {place() for place in others} == {str(tmp_path / "cache" / "inductor")}
    assert usual not in os.environ.values()


@pytest.mark.usefixtures("usual")
def test_without_a_private_place_a_temporary_one_serves(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.warns(UserWarning, match="kept only for this process: .*write in"):
        use_private_cache()
    made = Path(os.environ[VARIABLE])
    assert made.is_dir() and mode(made) == 0o700 and tmp_path not in made.parents
    with pytest.warns(UserWarning, match="only for this process"):
        use_private_cache()
    assert {place() for place in places()} == {str(made)} == {compiler_cache._temporary()}


@pytest.mark.usefixtures("usual")
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), ValueError("no home")])
def test_a_home_that_cannot_be_written(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: str) -> Path:
        raise error

    monkeypatch.setattr(compiler_cache, "private_cache", refuse)
    with pytest.warns(UserWarning, match=str(error.args[-1])):
        use_private_cache()
    assert mode(os.environ[VARIABLE]) == 0o700
