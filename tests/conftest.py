"""Fixtures that several parts' tests share."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A worker of pytest-xdist computes with one thread, and so do the programs that its tests start.
# The threads are set before the first import of torch. Tests of several threads set their number.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import pytest
import torch
from vectors import Vectors, read_vectors

if TYPE_CHECKING:
    from serving import Served

SERVER_ENVIRONMENT = Path(__file__).resolve().parents[1] / ".venv-server"
SERVER_FIXTURES = {"served", "server_environment"}
SERVER_FILES = ("tests/server/", "tests/security/test_server.py")

# A shell starts its background jobs with SIGINT ignored, and what the tests start would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# torch.compile's cache outlives a run, and what another left there, broken off or of other flags,
# is loaded without a question.
_COMPILED = tempfile.TemporaryDirectory(prefix="dit-engine-compiled-")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _COMPILED.name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use the server. Tests of a GPU are skipped where there is none."""
    for item in items:
        if SERVER_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.server)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """After an illegal memory access a process can no longer use its GPU. The worker then ends and
    another replaces it, so that one more test fails and not all the following ones."""
    if item.get_closest_marker("gpu") and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One worker runs all tests of a file, so that its fixtures are made once, and one worker runs
    all files that need the server, so that it starts once. (pytest-xdist 3.8 ignores its groups
    with pytest 9.2.) With --dist worksteal, which `dit-bench gpu --check` uses, workers take single
    tests."""
    if config.getoption("dist") == "worksteal":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return "server" if file.startswith(SERVER_FILES) else file

    return ByFile(config, log)


@pytest.fixture(params=["dit_p2_d24", "dit_p4_d72"])
def vectors(request: pytest.FixtureRequest) -> Vectors:
    return read_vectors(request.param)


@pytest.fixture(scope="session")
def no_proxy() -> Iterator[None]:
    """Without proxies from the environment, which cannot reach this machine's own servers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1,localhost")
        yield


@pytest.fixture(scope="session")
def server_environment(no_proxy: None) -> Path:
    if not (SERVER_ENVIRONMENT / ".done").exists():
        pytest.skip("no Triton Inference Server here: make server installs one (Linux, x86-64)")
    return SERVER_ENVIRONMENT


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository of `serving.served_model` in float32, written by the command."""
    from serving import MAX_BATCH_SIZE, served_model
    from tiny import NAMES, tiny_vae

    from dit_engine.checkpoint import save_pretrained
    from dit_export.cli import main

    path = tmp_path_factory.mktemp("served") / "repository"
    model = path.with_name("model")
    save_pretrained(model, served_model(), tiny_vae(), NAMES)
    options = ["--dtype", "fp32", "--max-batch-size", str(MAX_BATCH_SIZE), "-o", str(path)]
    assert main(["triton", "--model", str(model), *options]) == 0
    return path


@pytest.fixture(scope="session")
def served(server_environment: Path, repository: Path) -> Iterator[Served]:
    """A real Triton Inference Server of ``repository``, started once for all tests."""
    from serving import Served

    from dit_engine.engine import Engine
    from dit_export.server.binary import find_server
    from dit_export.server.process import running_server

    engine = Engine.from_pretrained(repository.with_name("model"), device="cpu")
    server = find_server(server_environment)
    with (
        repository.with_name("log").open("w") as log,
        running_server(repository, server, show=lambda line: print(line, file=log)) as running,
    ):
        yield Served(repository, running, engine)
