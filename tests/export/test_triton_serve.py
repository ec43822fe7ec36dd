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
from pathlib import Path

import numpy as np
import pytest
from triton_requests import infer, numbers

from dit_export.model_repository import source_of
from dit_export.triton.server import (
    ServerBinary,
    assemble_backends,
    find_server,
    running_server,
)


def answers(address: str) -> bool:
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_serve_until_it_is_told_to_end(
    server_environment: Path, repository: Path, tmp_path: Path, end: signal.Signals
) -> None:
    """Also where it is killed without a word, no server is left behind."""
    command = [sys.executable, "-m", "dit_export.cli", "triton", "--serve", str(repository)]
    command += ["--server", str(server_environment)]
    command += [argument for name in ("http", "grpc", "metrics")
                for argument in (f"--{name}-port", "0")]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        environment = os.environ | {"TMPDIR": str(tmp_path)}  # a killed one leaves files there
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        pattern = r"ready: http (\S+), gRPC (\S+), metrics (\S+)\n"
        found = re.fullmatch(pattern, ready)
        assert found is not None, (ready, (tmp_path / "log").read_text()[-2000:])
        with urllib.request.urlopen(f"http://{found[1]}/v2/health/ready") as answer:
            assert answer.status == 200
        if end == signal.SIGINT:
            inputs = {"labels": numbers(1), "seeds": numbers(1), "steps": numbers(1)}
            assert infer(found[2], inputs, "grpc").shape == (1, 64, 64, 3)
    finally:
        process.send_signal(end)
        code = process.wait(60)
        process.stdout.close()
    assert code == (0 if end == signal.SIGINT else -signal.SIGKILL)
    deadline = time.monotonic() + 60
    while answers(found[1]):
        assert time.monotonic() < deadline, "the server is still there"
        time.sleep(0.1)


def fake_server(folder: Path, script: str) -> Path:
    """A tritonserver with backends beside it, as in a container."""
    path = folder / "bin" / "tritonserver"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    for backend in ("python", "onnxruntime"):
        (folder / "backends" / backend).mkdir(parents=True)
    return path


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
    assert written == source_of("dit_export.triton.onnxruntime_backend.model")


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


def test_the_backend_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of one batch share a run; a bad one among them gets the error, alone."""
    import types

    import onnx
    from onnx import TensorProto, helper

    from dit_export.triton.onnxruntime_backend.model import TritonPythonModel

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
    utilities.Tensor, utilities.TritonError, utilities.InferenceResponse = Tensor, str, Response
    utilities.get_input_tensor_by_name = lambda request, name: Tensor(name, request.i)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utilities)
    served = TritonPythonModel()
    arguments = {"model_config": "{}", "model_repository": str(tmp_path), "model_version": "1"}
    served.initialize(arguments)
    good = served.execute([Request(0, 2), Request(1)])
    assert [r.tensors[0].value.tolist() for r in good] == [[10.0, 30.0], [20.0]]
    first, bad, last = served.execute([Request(0), Request(7), Request(1, 1)])
    assert first.tensors[0].value.tolist() == [10.0] and last.tensors[0].value.tolist() == [20, 20]
    assert bad.tensors == () and "out of data bounds" in bad.error
