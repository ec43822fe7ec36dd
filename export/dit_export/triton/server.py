"""A Triton Inference Server for one's own machine: found, started, waited for and stopped."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from dit_export.model_repository import read_marker, source_of

READY_SECONDS = 300.0
"""That loading may take; a large model's graphs are read from disk and warmed up."""
_PYTRITON = "pytriton/tritonserver"
_PARENT_DIED = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class ServerBinary:
    """A tritonserver and what it must be given to run.

    backends: its own backend directory. stub: the Python backend's helper, where it does not lie
    beside the backend. environment: variables to set.
    """

    path: Path
    backends: Path
    stub: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Running:
    """Addresses, "host:port", of a server that is ready."""

    http: str
    grpc: str
    metrics: str
    process: subprocess.Popen[bytes]


def find_server(given: Path | None = None) -> ServerBinary:
    """``given`` (a tritonserver, or a virtual environment that holds nvidia-pytriton), else the one
    on PATH, else this Python's own.

    Raises FileNotFoundError, one line that says how to get one.
    """
    if given is not None:
        if given.is_dir():
            return _of_environment(given / "bin" / "python")
        return _installed(given)
    if (found := shutil.which("tritonserver")) is not None:
        return _installed(Path(found))
    return _of_environment(Path(sys.executable))


def _installed(path: Path) -> ServerBinary:
    path = path.resolve()
    backends = path.parent.parent / "backends"  # as in NVIDIA's container
    if not path.is_file() or not (backends / "python").is_dir():
        raise FileNotFoundError(f"{path}: no tritonserver with its directory of backends beside it")
    return ServerBinary(path, backends)


def _of_environment(python: Path) -> ServerBinary:
    """The server in the wheel nvidia-pytriton, of the environment that ``python`` belongs to."""
    probe = (
        "import sysconfig as s, sys; print(s.get_path('purelib'), s.get_config_var('LIBDIR'), "
        "'%d.%d' % sys.version_info[:2], sep='\\n')"
    )
    where = python.parent.parent
    try:
        done = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise FileNotFoundError(f"{where}: no virtual environment") from None
    site, libraries, version = done.stdout.splitlines()
    root = Path(site) / _PYTRITON
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise FileNotFoundError(
            f"no Triton Inference Server on PATH or in {where}: name one with --server, a "
            "tritonserver or a virtual environment with nvidia-pytriton, onnxruntime and numpy<2"
        )
    path = root / "bin" / "tritonserver"
    if not os.access(path, os.X_OK):  # a wheel need not keep the permission
        path.chmod(path.stat().st_mode | 0o755)
    environment = {
        "LD_LIBRARY_PATH": f"{Path(site) / 'nvidia_pytriton.libs'}:{libraries}",
        # The Python inside the server heeds no PYTHONPATH: it takes the packages of the environment
        # in which PATH has its first python3.
        "PATH": f"{python.parent}:{os.environ.get('PATH', os.defpath)}",
    }
    return ServerBinary(path, root / "backends", stub, environment)


def assemble_backends(server: ServerBinary, folder: Path) -> Path:
    """A backend directory in which both platforms of our repositories can be found.

    Where the server has no onnxruntime of its own, ours in Python takes its place.
    """
    complete = (server.backends / "onnxruntime").is_dir() and server.stub is None
    if complete:
        return server.backends
    for backend in ("python", "tensorrt"):  # copies: the server refuses links that lead out
        if (server.backends / backend).is_dir():
            shutil.copytree(server.backends / backend, folder / backend)
    if server.stub is not None:
        stub = folder / "python" / server.stub.name
        shutil.copyfile(server.stub, stub)
        stub.chmod(0o755)
    (folder / "onnxruntime").mkdir()
    source = source_of("dit_export.triton.onnxruntime_backend.model")
    (folder / "onnxruntime" / "model.py").write_text(source, encoding="utf-8")
    return folder


@contextmanager
def running_server(
    repository: Path,
    server: ServerBinary,
    host: str = "127.0.0.1",
    ports: tuple[int, int, int] = (0, 0, 0),
    ready_seconds: float = READY_SECONDS,
    log: Path | None = None,
) -> Iterator[Running]:
    """A server of ``repository``, ready to be asked; it is stopped when the block ends.

    Should this process die without a word, the server goes with it (on Linux).

    Args:
        ports: HTTP, gRPC and metrics; 0 is any free one.
        log: file for what the server prints; None is standard error.

    Raises:
        ValueError: no repository of ours, or a port that is taken.
        RuntimeError: it ended, or was not ready in time.
    """
    read_marker(repository)
    chosen = [port or _free_port(host) for port in ports]
    for port in chosen:
        _check_free(host, port)
    with tempfile.TemporaryDirectory(prefix="triton-backends-") as folder:
        command = [
            str(server.path),
            f"--model-repository={repository.resolve()}",
            f"--backend-directory={assemble_backends(server, Path(folder))}",
            "--disable-auto-complete-config",
            "--exit-timeout-secs=5",
        ]
        for name, port in zip(("http", "grpc", "metrics"), chosen, strict=True):
            command += [f"--{name}-address={host}", f"--{name}-port={port}"]
        with _output(log) as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | server.environment,
                start_new_session=True,  # Ctrl-C reaches us alone, and we pass it on
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
            try:
                http, grpc, metrics = (f"{host}:{port}" for port in chosen)
                _wait_until_ready(process, http, ready_seconds, log)
                yield Running(http, grpc, metrics, process)
            finally:
                _stop(process)


def serve(
    repository: Path, given: Path | None, host: str, ports: tuple[int, int, int]
) -> int:  # pragma: no cover
    """Run a server until Ctrl-C (or SIGTERM); print where it answers once it is ready."""
    read_marker(repository)
    server = find_server(given)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        with running_server(repository, server, host, ports) as running:
            print(f"ready: http {running.http}, gRPC {running.grpc}, metrics {running.metrics}")
            print(f"python {repository / 'client.py'} --url {running.http} … ; Ctrl-C ends it",
                  flush=True)  # fmt: skip
            code = running.process.wait()
    except KeyboardInterrupt:
        return 0
    except RuntimeError as error:
        raise OSError(str(error)) from None
    raise OSError(f"the server ended with code {code}")


@contextmanager
def _output(log: Path | None) -> Iterator[int]:
    if log is None:
        yield sys.stderr.fileno()
        return
    with log.open("wb") as file:
        yield file.fileno()


def _wait_until_ready(
    process: subprocess.Popen[bytes], address: str, seconds: float, log: Path | None
) -> None:
    where = "" if log is None else f"; see {log}"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (code := process.poll()) is not None:
            raise RuntimeError(f"the server ended with code {code} before it was ready{where}")
        try:
            with urllib.request.urlopen(f"http://{address}/v2/health/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"the server was not ready after {seconds:.0f} s{where}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The server, and whatever of its helpers is left."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGTERM)


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _check_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"{host}:{port}: cannot be listened on: {error.strerror}") from None
