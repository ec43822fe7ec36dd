"""A Triton Inference Server for one's own machine: started, waited for and stopped."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from dit_export.model_repository import read_marker
from dit_export.triton import supervisor
from dit_export.triton.server_binary import ServerBinary, assemble_backends, find_server

_STOP_SECONDS = supervisor.ASK_SECONDS + 5


@dataclass(frozen=True)
class Running:
    """Addresses, "host:port", of a server that is ready; process: its supervisor."""

    http: str
    grpc: str
    metrics: str
    process: subprocess.Popen[bytes]


@contextmanager
def running_server(
    repository: Path,
    server: ServerBinary,
    host: str = "127.0.0.1",
    ports: tuple[int, int, int] = (0, 0, 0),
    ready_seconds: float = 300.0,
    log: Path | None = None,
) -> Iterator[Running]:
    """A server of ``repository``, ready to be asked; it is stopped when the block ends.

    Should this process die without a word, the server goes with it (`supervisor`).

    Args:
        ports: HTTP, gRPC and metrics; 0 is any free one.
        ready_seconds: that loading may take: graphs are read from disk and warmed up.
        log: file for what the server prints; None is standard error.

    Raises:
        ValueError: no repository of ours, or a port that is taken, or none.
        RuntimeError: it ended, or was not ready in time.
    """
    read_marker(repository)
    chosen = choose_ports(host, ports)
    with tempfile.TemporaryDirectory(prefix="triton-backends-") as folder:
        command = [
            *(sys.executable, "-I", "-S", supervisor.__file__),
            # Not for the supervisor, whose Python needs its own libraries.
            *("env", *(f"{name}={value}" for name, value in server.environment.items())),
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
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone, and we pass it on
            )
            try:
                http, grpc, metrics = (f"{host}:{port}" for port in chosen)
                _wait_until_ready(process, http, ready_seconds, log)
                yield Running(http, grpc, metrics, process)
            finally:
                _stop(process)


def serve(
    repository: Path,
    given: Path | None,
    host: str,
    ports: tuple[int, int, int],
    ready_seconds: float,
) -> int:  # pragma: no cover
    """Run a server until Ctrl-C (or SIGTERM); print where it answers once it is ready."""
    read_marker(repository)
    server = find_server(given)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with running_server(repository, server, host, ports, ready_seconds) as running:
            print(f"ready: http {running.http}, gRPC {running.grpc}, metrics {running.metrics}")
            client = shlex.quote(str(repository / "client.py"))
            print(f"python {client} {running.http} images.png 50 0; Ctrl-C ends it", flush=True)
            code = running.process.wait()
    except KeyboardInterrupt:
        return 0
    except RuntimeError as error:
        raise OSError(str(error)) from None
    finally:
        signal.signal(signal.SIGTERM, before)
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
    # The environment may name a proxy, which knows nothing of this machine's own addresses.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (code := process.poll()) is not None:
            raise RuntimeError(f"the server ended with code {code} before it was ready{where}")
        try:
            with direct.open(f"http://{address}/v2/health/ready", timeout=5):
                return
        except (OSError, HTTPException):
            time.sleep(0.1)
    raise RuntimeError(f"the server was not ready after {seconds:g} s{where}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The server, and whatever of its helpers is left. A second Ctrl-C does not wait for it."""
    assert process.stdin is not None
    try:
        process.stdin.close()  # for the supervisor, a word to end
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def choose_ports(host: str, ports: Sequence[int]) -> tuple[int, ...]:
    """``ports`` with any free one in the place of each 0; all are different and can be listened on.

    Raises ValueError for one that is none, taken, or given twice.
    """
    chosen = list(ports)
    with ExitStack() as held:  # all at once, so that no port is chosen twice
        for i in sorted(range(len(ports)), key=lambda i: ports[i] == 0):  # the given ones first
            if not 0 <= ports[i] < 65536:
                raise ValueError(f"port {ports[i]}: allowed is 0 (any free one) to 65535")
            if ports[i] and ports.count(ports[i]) > 1:
                raise ValueError(f"port {ports[i]} is given twice")
            listener = held.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, ports[i]))
                listener.listen(1)  # with that option, a port is one's own only then
            except OSError as error:
                reason = error.strerror or error
                raise ValueError(f"{host}:{ports[i]}: cannot be listened on: {reason}") from None
            chosen[i] = listener.getsockname()[1]
    return tuple(chosen)
