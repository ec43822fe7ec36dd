"""How a server is found, started and stopped, by programs and by `dit-export triton --serve`."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from bundles import write_bundle
from fake_server import fake_server, ready_server
from serving import infer, numbers, wait_until

from dit_export.cli import main
from dit_export.server.binary import ServerBinary, assemble_backends, find_server
from dit_export.server.process import choose_ports, running_server
from dit_export.server.repository import write_repository
from dit_export.server.sources import source_of

PORTS = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]


@pytest.fixture(scope="module")
def empty_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose graphs are empty, for servers that do not read them."""
    folder = tmp_path_factory.mktemp("empty")
    return write_repository(write_bundle(folder / "onnx"), folder / "repository")


def gone(pid: int) -> bool:
    """Whether a process has ended. It has an entry until its parent asks for its exit code."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() == b""
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="children are found by Linux's /proc")
def test_a_killed_command_leaves_no_server(
    server_environment: Path, repository: Path, tmp_path: Path
) -> None:
    """It has no time to stop the real server, which its supervisor must notice."""
    command = [sys.executable, "-m", "dit_export.cli", "triton", "--serve", str(repository)]
    command += ["--server", str(server_environment), *PORTS]
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # a killed command leaves files there
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment) as process,
    ):
        assert process.stdout is not None
        found = re.match(rb"ready: http (\S+), gRPC (\S+),", process.stdout.readline())
        pid = process.pid
        (group,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        try:
            assert found is not None, (tmp_path / "log").read_text()
            inputs = {"labels": numbers(1), "seeds": numbers(1), "steps": numbers(1)}
            assert infer(found[2].decode(), inputs, "grpc").shape == (1, 16, 16, 3)
            process.kill()
            wait_until(lambda: gone(group), 60)  # the supervisor, when the server has ended
        finally:
            process.kill()
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
    host, _, port = found[1].decode().partition(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)


@pytest.mark.parametrize(("end", "stubborn"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_ends_it_and_a_second_one_does_not_wait(
    empty_repository: Path, tmp_path: Path, end: signal.Signals, stubborn: bool,
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A stubborn server takes no notice of the first; it would be waited for, for 20 seconds. No
    shared memory is left. A proxy is not asked whether the server is ready."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    folder, began = tmp_path / "opt", time.monotonic()
    server = ready_server(folder, stubborn)

    def interrupt() -> None:
        wait_until((folder / "ready").exists)
        os.kill(os.getpid(), end)
        if stubborn:
            wait_until((folder / "asked").exists)
            os.kill(os.getpid(), end)

    thread = threading.Thread(target=interrupt)
    thread.start()
    command = ["triton", "--serve", str(empty_repository), "--server", str(server), *PORTS]
    assert main([*command, "--ready-timeout", "60"]) == 0 and time.monotonic() - began < 15
    thread.join()
    assert capfd.readouterr().err == "" and not Path((folder / "ready").read_text()).exists()


def test_where_a_server_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_server(tmp_path / "opt", "exit 0")
    backends = tmp_path / "opt" / "backends"
    expected = ServerBinary(path, backends)
    assert find_server(path) == expected
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    assert find_server() == expected and assemble_backends(expected, tmp_path) == backends
    (backends / "onnxruntime").rmdir()  # then ours takes its place
    (backends / "python" / "libtriton_python.so").write_bytes(b"library")
    (tmp_path / "made").mkdir()
    made = assemble_backends(expected, tmp_path / "made")
    assert (made / "python" / "libtriton_python.so").read_bytes() == b"library"
    written = (made / "onnxruntime" / "model.py").read_text()
    assert written == source_of("dit_export.server.onnxruntime_backend")
    monkeypatch.setenv("PATH", str(tmp_path))
    for given, message in (
        (tmp_path, "no virtual environment"),
        (tmp_path / "tritonserver", "no tritonserver with its directory of backends beside it"),
        (None, "no Triton Inference Server on PATH or in .*--server"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            find_server(given)


def test_a_server_that_ends_or_never_gets_ready(
    empty_repository: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ends = fake_server(tmp_path / "a", r"seq 999; printf '\033[2Jred\n'; exit 3")
    command = ["triton", "--serve", str(empty_repository), *PORTS, "--server"]
    error = "error: the server ended with code 3 before it was ready"
    for more, first in (((), 971), (("--verbose",), 1)):  # the last lines, or all of them
        assert main([*command, str(ends), *more]) == 2
        out, err = capfd.readouterr()
        printed = [*map(str, range(first, 1000)), r"\x1b[2Jred"]
        assert (out, err.splitlines()) == ("", [*printed, error])
    sleeps, began = fake_server(tmp_path / "b", "exec sleep 1000"), time.monotonic()
    assert main([*command, str(sleeps), "--ready-timeout", "0.5"]) == 2
    assert capfd.readouterr().err == "error: the server was not ready after 0.5 s\n"
    assert time.monotonic() - began < 10


def test_ports(empty_repository: Path, tmp_path: Path) -> None:
    free = choose_ports("127.0.0.1", (0, 0, 0))
    assert len(set(free)) == 3 and choose_ports("127.0.0.1", free) == free
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        listener.accept()[0].close()  # this connection lingers on the port for a minute
        server = find_server(fake_server(tmp_path / "opt", "exit 0"))
        for ports in ((0, port, 0), (0, 70000, 0), (-1, 0, 0), (0, free[0], free[0])):
            with (
                pytest.raises(ValueError, match=r"^127.0.0.1:-?\d+: cannot be listened on: "),
                running_server(empty_repository, server, ports=ports),
            ):
                pass
    client.close()
    assert choose_ports("127.0.0.1", (0, port, 0))[1] == port
