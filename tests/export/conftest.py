"""A real Triton Inference Server with the built-in model, started once for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import MAX_BATCH_SIZE, Served

from dit_engine.engine import Engine
from dit_export.cli import main
from dit_export.triton.server import running_server
from dit_export.triton.server_binary import find_server

SERVER_ENVIRONMENT = Path(__file__).resolve().parents[2] / ".venv-server"


@pytest.fixture(autouse=True, scope="session")
def no_proxy() -> Iterator[None]:
    """A proxy of the environment knows nothing of this machine's own servers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1,localhost")
        yield


@pytest.fixture(scope="session")
def server_environment() -> Path:
    if not (SERVER_ENVIRONMENT / ".done").exists():
        pytest.skip("no Triton Inference Server here: make server installs one (Linux, x86-64)")
    return SERVER_ENVIRONMENT


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the built-in model in float32."""
    path = tmp_path_factory.mktemp("triton") / "repository"
    options = ["--dtype", "fp32", "--max-batch-size", str(MAX_BATCH_SIZE), "-o", str(path)]
    assert main(["triton", *options]) == 0
    return path


@pytest.fixture(scope="session")
def served(server_environment: Path, repository: Path) -> Iterator[Served]:
    server = find_server(server_environment)
    log = repository.parent / "server.log"
    with running_server(repository, server, log=log) as running:
        yield Served(repository, running, Engine.from_pretrained("builtin", device="cpu"))
