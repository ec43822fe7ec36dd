"""How a server is found, started and stopped, by programs and by `dit-export triton --serve`."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from bundles import write_bundle
from fake_server import fake_server, ready_server
from serving import infer, numbers

from dit_export.cli import main
from dit_export.server import process as server_module
from dit_export.server.binary import ServerBinary, assemble_backends, find_server
from dit_export.server.process import choose_ports, running_server
from dit_export.server.repository import write_repository
from dit_export.server.sources import source_of

PORTS = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
linux = pytest.mark.skipif(not Path("/proc").is_dir(), reason="children are found by Linux's /proc")


@pytest.fixture(scope="module")
def empty_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose graphs are empty, for servers that do not read them."""
    folder = tmp_path_factory.mktemp("empty")
    return write_repository(write_bundle(folder / "onnx"), folder / "repository")


def answers(address: str) -> bool:
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def runs(pid: int) -> bool:
    """Whether a process runs. An ended one has an entry until its parent asks for its exit code."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except (FileNotFoundError, ProcessLookupError):
        return False


class Command:
    """`dit-export triton --serve` in a process, as a shell starts it, and what it has started."""

    def __init__(self, repository: Path, server: Path, folder: Path, *more: str) -> None:
        options = ["--serve", str(repository), "--server", str(server), *PORTS, *more]
        self.log, self.groups = folder / "log", set[int]()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dit_export.cli", "triton", *options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"TMPDIR": str(folder)},  # a killed one leaves files there
            )

    def addresses(self) -> tuple[str, str]:
        """HTTP and gRPC, once the server is ready."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self._look()
        found = re.fullmatch(r"ready: http (\S+), gRPC (\S+), metrics \S+\n", line)
        assert found is not None, (line, self.log.read_text()[-2000:])
        return found[1], found[2]

    def end(self) -> None:
        """All of it, whatever its state."""
        self._look()
        with self.process:
            self.process.kill()
        for group in self.groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

    def _look(self) -> None:
        """The supervisor leads a group of its own, with the server and its helpers."""
        pid = self.process.pid
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            self.groups |= {child for child in map(int, children) if os.getpgid(child) == child}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts a `Command`; nothing of it is left when the test ends, also if the test fails."""
    with ExitStack() as stack:

        def started(repository: Path, server: Path, *more: str) -> Command:
            command = Command(repository, server, tmp_path, *more)
            stack.callback(command.end)
            return command

        yield started


@linux
def test_a_killed_command_leaves_no_server(
    server_environment: Path, repository: Path, start: Callable[..., Command]
) -> None:
    """It has no time to stop the real server, which its supervisor must notice."""
    command = start(repository, server_environment)
    http, grpc = command.addresses()
    inputs = {"labels": numbers(1), "seeds": numbers(1), "steps": numbers(1)}
    assert infer(grpc, inputs, "grpc").shape == (1, 16, 16, 3)
    command.process.kill()
    assert command.process.wait(60) == -signal.SIGKILL
    wait_until(lambda: not answers(http), 60)
    (group,) = command.groups  # the supervisor, which removes the server's shared memory
    wait_until(lambda: not runs(group), 60)


@pytest.mark.parametrize(("end", "stubborn"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_ends_it_and_a_second_one_does_not_wait(
    empty_repository: Path, start: Callable[..., Command], tmp_path: Path,
    end: signal.Signals, stubborn: bool,
) -> None:  # fmt: skip
    """A stubborn server takes no notice of the first; it would be waited for, for 20 seconds."""
    command = start(empty_repository, ready_server(tmp_path / "opt", stubborn))
    http, _ = command.addresses()
    began = time.monotonic()
    command.process.send_signal(end)
    if stubborn:
        wait_until((tmp_path / "opt" / "asked").exists)
        assert command.process.poll() is None and answers(http)
        command.process.send_signal(end)
    assert command.process.wait(60) == 0 and time.monotonic() - began < 10
    wait_until(lambda: not answers(http))
    assert command.log.read_text() == ""


def test_where_a_server_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_server(tmp_path / "opt", "exit 0")
    expected = ServerBinary(path, tmp_path / "opt" / "backends")
    assert find_server(path) == expected
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    assert find_server() == expected
    assert assemble_backends(expected, tmp_path / "unused") == tmp_path / "opt" / "backends"
    assert not (tmp_path / "unused").exists()
    (tmp_path / "opt" / "backends" / "onnxruntime").rmdir()  # then ours takes its place
    (tmp_path / "opt" / "backends" / "python" / "libtriton_python.so").write_bytes(b"library")
    (tmp_path / "made").mkdir()
    backends = assemble_backends(expected, tmp_path / "made")
    assert (backends / "python" / "libtriton_python.so").read_bytes() == b"library"
    written = (backends / "onnxruntime" / "model.py").read_text()
    assert written == source_of("dit_export.server.onnxruntime_backend")
    monkeypatch.setenv("PATH", str(tmp_path))
    for given, message in (
        (tmp_path, "no virtual environment"),
        (tmp_path / "tritonserver", "no tritonserver with its directory of backends beside it"),
        (Path(sys.prefix), "name one with --server, a tritonserver or a virtual environment with"),
        (None, "no Triton Inference Server on PATH or in"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            find_server(given)


def test_a_server_that_ends_or_never_gets_ready(
    empty_repository: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ends = fake_server(tmp_path / "a", "seq 1000; exit 3")
    log = tmp_path / "log"
    with (
        pytest.raises(RuntimeError, match=r"ended with code 3 before it was ready; see .*log$"),
        running_server(empty_repository, find_server(ends), log=log),
    ):
        pass
    assert log.read_text().splitlines() == [*map(str, range(1, 1001))]
    command = ["triton", "--serve", str(empty_repository), *PORTS, "--server"]
    error = "error: the server ended with code 3 before it was ready"
    for more, first in (((), 971), (("--verbose",), 1)):  # the last lines, or all of them
        assert main([*command, str(ends), *more]) == 2
        out, err = capfd.readouterr()
        assert (out, err.splitlines()) == ("", [*map(str, range(first, 1001)), error])
    sleeps, began = fake_server(tmp_path / "b", "exec sleep 1000"), time.monotonic()
    assert main([*command, str(sleeps), "--ready-timeout", "0.5"]) == 2
    assert capfd.readouterr().err == "error: the server was not ready after 0.5 s\n"
    assert time.monotonic() - began < 10


def test_ports(empty_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ports, message in (
        ((0, 70000, 0), r"^port 70000: allowed is 0 \(any free one\) to 65535$"),
        ((-1, 0, 0), r"^port -1: allowed is 0"),
        ((0, 18123, 18123), r"^port 18123 is given twice$"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_ports("127.0.0.1", ports)
    server = find_server(fake_server(tmp_path / "opt", "exit 0"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ValueError, match=f"127.0.0.1:{port}: cannot be listened on"),
            running_server(empty_repository, server, ports=(0, port, 0)),
        ):
            pass
    for _ in range(20):
        ports = choose_ports("127.0.0.1", (0, 0, 0))
        assert len(set(ports)) == 3 and all(1024 <= port < 65536 for port in ports)
    taken_ports: set[int] = set()

    class Socket:
        """On a system that gives the port let go last, as it may."""

        def __enter__(self) -> Socket:
            return self

        def __exit__(self, *_: object) -> None:
            taken_ports.discard(self.port)

        def setsockopt(self, *_: object) -> None: ...

        def bind(self, address: tuple[str, int]) -> None:
            self.port = address[1] or next(p for p in range(5000, 6000) if p not in taken_ports)
            if self.port in taken_ports:
                raise OSError(98, "Address already in use")
            taken_ports.add(self.port)

        def listen(self, _: int) -> None: ...

        def getsockname(self) -> tuple[str, int]:
            return "127.0.0.1", self.port

    monkeypatch.setattr(server_module.socket, "socket", Socket)
    assert choose_ports("127.0.0.1", (0, 0, 0)) == (5000, 5001, 5002)
    assert choose_ports("127.0.0.1", (0, 5000, 0)) == (5001, 5000, 5002)
    assert taken_ports == set()


def test_a_proxy_of_the_environment_is_not_asked_whether_the_server_is_ready(
    empty_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = find_server(ready_server(tmp_path / "opt"))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{unused.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        log = tmp_path / "log"
        with running_server(empty_repository, server, log=log, ready_seconds=20) as running:
            assert answers(running.http)
    wait_until(lambda: not answers(running.http))
