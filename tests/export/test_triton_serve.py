"""`dit-export triton --serve`, and how a server is found, started and stopped."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
from fake_server import fake_server, ready_server
from triton_requests import infer, numbers

from dit_export.cli import main
from dit_export.server import process as server_module
from dit_export.server.binary import ServerBinary, assemble_backends, find_server
from dit_export.server.process import choose_ports, running_server
from dit_export.server.sources import source_of


def answers(address: str) -> bool:
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


class Command:
    """`dit-export triton --serve` in a process, as a shell starts it, and what it has started."""

    def __init__(self, repository: Path, server: Path, folder: Path, *more: str) -> None:
        options = ["--serve", str(repository), "--server", str(server), *more]
        ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
        self.log, self.groups = folder / "log", set[int]()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dit_export.cli", "triton", *options, *ports],
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
def start(repository: Path, tmp_path: Path) -> Iterator[Callable[[Path], Command]]:
    """Starts a `Command` with a server; of those started nothing is left when the test ends."""
    with ExitStack() as stack:

        def started(server: Path) -> Command:
            command = Command(repository, server, tmp_path)
            stack.callback(command.end)
            return command

        yield started


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_serve_until_it_is_told_to_end(
    server_environment: Path, start: Callable[[Path], Command], end: signal.Signals
) -> None:
    """Also where it is killed without a word, no server is left behind."""
    command = start(server_environment)
    http, grpc = command.addresses()
    with urllib.request.urlopen(f"http://{http}/v2/health/ready") as answer:
        assert answer.status == 200
    if end == signal.SIGINT:
        inputs = {"labels": numbers(1), "seeds": numbers(1), "steps": numbers(1)}
        assert infer(grpc, inputs, "grpc").shape == (1, 16, 16, 3)
    command.process.send_signal(end)
    assert command.process.wait(60) == (0 if end == signal.SIGINT else -signal.SIGKILL)
    wait_until(lambda: not answers(http), 60)
    (group,) = command.groups  # the supervisor, which removes the server's shared memory
    wait_until(lambda: not runs(group), 60)


def runs(pid: int) -> bool:
    """Whether a process runs. An ended one has an entry until its parent asks for its exit code."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="children are found by Linux's /proc")
def test_a_test_that_fails_leaves_no_server(
    stubborn: Path, repository: Path, tmp_path: Path
) -> None:
    command = Command(repository, stubborn, tmp_path, "--verbose")
    http, _ = command.addresses()
    assert answers(http)
    command.end()
    assert command.log.read_text() == "a wide table\n"  # what the server prints
    assert command.process.returncode == -signal.SIGKILL
    wait_until(lambda: not answers(http), 5)  # and not as the supervisor would, after 20 seconds
    assert len(command.groups) == 1


def test_where_a_server_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_server(tmp_path / "opt", "exit 0")
    expected = ServerBinary(path, tmp_path / "opt" / "backends")
    assert find_server(path) == expected
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    assert find_server() == expected
    assert assemble_backends(expected, tmp_path / "unused") == tmp_path / "opt" / "backends"
    assert not (tmp_path / "unused").exists()


def test_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for given, message in (
        (tmp_path, "no virtual environment"),
        (tmp_path / "tritonserver", "no tritonserver with its directory of backends beside it"),
        (Path(sys.prefix), "name one with --server, a tritonserver or a virtual environment with"),
        (None, "no Triton Inference Server on PATH or in"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            find_server(given)


def test_our_onnxruntime_where_the_server_has_none(tmp_path: Path) -> None:
    path = fake_server(tmp_path / "opt", "exit 0")
    (tmp_path / "opt" / "backends" / "onnxruntime").rmdir()
    (tmp_path / "opt" / "backends" / "python" / "libtriton_python.so").write_bytes(b"library")
    (tmp_path / "made").mkdir()
    backends = assemble_backends(find_server(path), tmp_path / "made")
    assert (backends / "python" / "libtriton_python.so").read_bytes() == b"library"
    written = (backends / "onnxruntime" / "model.py").read_text()
    assert written == source_of("dit_export.server.onnxruntime_backend")


def test_a_server_that_ends_or_never_gets_ready(repository: Path, tmp_path: Path) -> None:
    ends = find_server(fake_server(tmp_path / "a", "echo no license; exit 3"))
    log = tmp_path / "log"
    with (
        pytest.raises(RuntimeError, match=r"ended with code 3 before it was ready; see .*log$"),
        running_server(repository, ends, log=log),
    ):
        pass
    assert log.read_text() == "no license\n"
    sleeps = find_server(fake_server(tmp_path / "b", "exec sleep 1000"))
    began = time.monotonic()
    with (
        pytest.raises(RuntimeError, match="was not ready after 1 s"),
        running_server(repository, sleeps, log=log, ready_seconds=1),
    ):
        pass
    assert time.monotonic() - began < 10


def test_a_port_that_is_taken(repository: Path, tmp_path: Path) -> None:
    server = find_server(fake_server(tmp_path / "opt", "exit 0"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ValueError, match=f"127.0.0.1:{port}: cannot be listened on"),
            running_server(repository, server, ports=(0, port, 0)),
        ):
            pass


def test_ports_are_free_and_all_different() -> None:
    for _ in range(50):
        ports = choose_ports("127.0.0.1", (0, 0, 0))
        assert len(set(ports)) == 3 and all(1024 <= port < 65536 for port in ports)
    (port, *_) = choose_ports("127.0.0.1", (0, 0, 0))
    given = choose_ports("127.0.0.1", (0, 0, port))
    assert given[2] == port and len(set(given)) == 3


def test_a_free_port_is_chosen_while_the_others_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a system that gives the port let go last, as it may."""
    taken: set[int] = set()

    class Socket:
        def __enter__(self) -> Socket:
            return self

        def __exit__(self, *_: object) -> None:
            taken.discard(self.port)

        def setsockopt(self, *_: object) -> None: ...

        def bind(self, address: tuple[str, int]) -> None:
            self.port = address[1] or next(p for p in range(5000, 6000) if p not in taken)
            if self.port in taken:
                raise OSError(98, "Address already in use")
            taken.add(self.port)

        def listen(self, _: int) -> None: ...

        def getsockname(self) -> tuple[str, int]:
            return "127.0.0.1", self.port

    monkeypatch.setattr(server_module.socket, "socket", Socket)
    assert choose_ports("127.0.0.1", (0, 0, 0)) == (5000, 5001, 5002)
    assert choose_ports("127.0.0.1", (0, 5000, 0)) == (5001, 5000, 5002)
    assert taken == set()


@pytest.mark.parametrize(
    ("ports", "message"),
    [
        ((0, 70000, 0), r"^port 70000: allowed is 0 \(any free one\) to 65535$"),
        ((-1, 0, 0), r"^port -1: allowed is 0"),
        ((0, 18123, 18123), r"^port 18123 is given twice$"),
    ],
)
def test_ports_that_are_none(ports: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_ports("127.0.0.1", ports)


@pytest.fixture
def stubborn(tmp_path: Path) -> Path:
    return ready_server(tmp_path / "stubborn", stubborn=True)


def test_a_proxy_of_the_environment_is_not_asked_whether_the_server_is_ready(
    repository: Path, stubborn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.setattr(server_module, "_STOP_SECONDS", 0.1)
        server = find_server(stubborn)
        with running_server(repository, server, log=tmp_path / "log", ready_seconds=20) as running:
            assert answers(running.http)
    wait_until(lambda: not answers(running.http))  # killed, it ends a moment later


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_wait_and_leaves_nothing(
    stubborn: Path, start: Callable[[Path], Command], tmp_path: Path, end: signal.Signals
) -> None:
    """The server takes no notice of the first; it would be waited for, for 20 seconds."""
    command = start(stubborn)
    http, _ = command.addresses()
    command.process.send_signal(end)
    wait_until((tmp_path / "stubborn" / "asked").exists)
    assert command.process.poll() is None and answers(http)
    began = time.monotonic()
    command.process.send_signal(end)
    assert command.process.wait(60) == 0 and time.monotonic() - began < 10
    wait_until(lambda: not answers(http))
    assert command.log.read_text() == ""


def test_ready_timeout_of_the_command(
    repository: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sleeps = fake_server(tmp_path / "opt", "exec sleep 1000")
    ports = [f"--{port}-port=0" for port in ("http", "grpc", "metrics")]
    arguments = ["--serve", str(repository), "--server", str(sleeps), "--ready-timeout", "0.5"]
    assert main(["triton", *arguments, *ports]) == 2
    assert capfd.readouterr().err == "error: the server was not ready after 0.5 s\n"


def test_the_last_lines_of_a_server_that_fails(
    repository: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All of them on demand; and what only a server can be told is refused without one."""
    ends = fake_server(tmp_path / "opt", "seq 1000; exit 3")
    ports = [f"--{port}-port=0" for port in ("http", "grpc", "metrics")]
    command = ["triton", "--serve", str(repository), "--server", str(ends), *ports]
    error = "error: the server ended with code 3 before it was ready"
    for more, first in (((), 971), (("--verbose",), 1)):
        assert main([*command, *more]) == 2
        out, err = capfd.readouterr()
        assert (out, err.splitlines()) == ("", [*map(str, range(first, 1001)), error])
    assert main(["triton", "-o", str(tmp_path / "made"), "--verbose"]) == 2
    refused = "error: --verbose is an option of --serve, which is not given\n"
    assert capfd.readouterr() == ("", refused)


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_backend_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of one batch share a run; a bad one among them gets the error, alone."""
    import types

    import onnx
    from onnx import TensorProto, helper

    from dit_export.server.onnxruntime_backend import TritonPythonModel

    table = helper.make_tensor("table", TensorProto.FLOAT, [3], [10.0, 20.0, 30.0])
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "i"], ["out"])], "g",
        [helper.make_tensor_value_info("i", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n"])], [table],
    )  # fmt: skip
    (tmp_path / "1").mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "1" / "model.onnx")

    class Tensor:
        def __init__(self, name: str, value: np.ndarray) -> None:
            self.name, self.value = name, value

        def as_numpy(self) -> np.ndarray:
            return self.value

    class Request:
        def __init__(self, *i: int) -> None:
            self.i = np.array(i)

        def requested_output_names(self) -> list[str]:
            return ["out"]

    class Response:
        def __init__(self, output_tensors: object = (), error: object = None) -> None:
            self.tensors, self.error = output_tensors, error

    utilities = types.ModuleType("triton_python_backend_utils")

    class Error(str):
        INVALID_ARG, INTERNAL = "invalid", "internal"

        def __new__(cls, message: str, code: str) -> Error:
            return super().__new__(cls, f"{code}: {message}")

    utilities.Tensor, utilities.TritonError, utilities.InferenceResponse = Tensor, Error, Response
    utilities.get_input_tensor_by_name = lambda request, name: Tensor(name, request.i)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utilities)
    served = TritonPythonModel()
    arguments = {"model_config": "{}", "model_repository": str(tmp_path), "model_version": "1"}
    served.initialize(arguments)
    good = served.execute([Request(0, 2), Request(1)])
    assert [r.tensors[0].value.tolist() for r in good] == [[10.0, 30.0], [20.0]]
    first, bad, last = served.execute([Request(0), Request(7), Request(1, 1)])
    assert first.tensors[0].value.tolist() == [10.0] and last.tensors[0].value.tolist() == [20, 20]
    assert bad.tensors == () and re.match("invalid: .* out of data bounds", bad.error)
    monkeypatch.setattr(served, "session", None)  # a fault of ours
    (broken,) = served.execute([Request(0)])
    assert broken.error.startswith("internal: 'NoneType'")
