"""Start a Triton Inference Server on this machine, wait until it is ready, and stop it."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from dit_engine.io.caches import private_cache
from dit_engine.io.printable import say
from dit_export.server import origin, supervisor
from dit_export.server.binary import ServerBinary, assemble_backends
from dit_export.server.configuration import ENGINE_CACHE
from dit_export.server.remote import is_loopback
from dit_export.server.repository import check_marker
from dit_export.server.trust import check_repository, served_copy

_STOP_SECONDS = supervisor.ASK_SECONDS + 5
_LONGEST_LINE = 1 << 16
# No client of ours needs these endpoints. Before Triton 25.07, clients could read and overwrite the
# memory of the Python backend through the first.
_CLOSED = "shared-memory,model-repository,trace,logging"


class ServerFailed(RuntimeError):
    """The server ended, or was not ready in time.

    what: the message without the path of the log, which str() includes.
    """

    def __init__(self, what: str, log: Path | None) -> None:
        super().__init__(what if log is None else f"{what}; see {log}")
        self.what = what


@dataclass(frozen=True)
class Running:
    """Addresses ("host:port") of a server that is ready, and the process of its supervisor."""

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
    trust: bool = False,
) -> Iterator[Running]:
    """Start a server of ``repository``, wait until it is ready, and stop it when the block ends.

    If this process is killed, the server ends too (see `supervisor`). The endpoints for shared
    memory, loading of models, traces and logging are closed, and requests from web pages get no
    images (see `origin`). A warning says if other machines can reach ``host``.

    Args:
        ports: for HTTP, gRPC and metrics; 0 means any free port.
        ready_seconds: the time that loading and warming up may take.
        log: the file for the server's output; None means standard error.
        trust: run whatever code the repository has. Otherwise its code must be what this version
            writes (see `trust.check_repository`).

    Raises:
        ValueError: ``repository`` is not a repository of ours or has other code, or a port is out
            of range or taken.
        ServerFailed: the server ended, or was not ready in time.
    """
    check_marker(repository)
    files = None if trust else check_repository(repository)
    chosen = choose_ports(host, ports)
    if not is_loopback(host):
        warnings.warn(
            f"whoever reaches {host} can ask this server for images and, if it is older than "
            "Triton 25.07, end it with one request: it is meant for your own machine only",
            stacklevel=3,
        )
    prefix = f"dit-{secrets.token_hex(8)}-"
    with tempfile.TemporaryDirectory(prefix="triton-") as folder, _output(log) as output:
        models, backends, here = (Path(folder) / name for name in ("models", "backends", "here"))
        for made in (models, backends, here):
            made.mkdir()
        served = repository if files is None else served_copy(repository, files, models)
        if _keeps_engines(served):
            with suppress(OSError, ValueError):  # without a private cache, nothing is kept
                (here / ENGINE_CACHE).symlink_to(private_cache("triton"))
        command = [
            *(sys.executable, "-I", "-S", supervisor.__file__, prefix),
            *_command(server, served.resolve(), assemble_backends(server, backends), host, prefix),
        ]
        for name, port in zip(("http", "grpc", "metrics"), chosen, strict=True):
            command += [f"--{name}-address={host}", f"--{name}-port={port}"]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=here,  # where the Python backend looks for modules first
            start_new_session=True,  # Ctrl-C reaches only this process, which stops the server
        )
        try:
            http, grpc, metrics = (f"{host}:{port}" for port in chosen)
            _wait_until_ready(process, http, ready_seconds, log)
            supervisor.hide_regions(prefix)
            yield Running(http, grpc, metrics, process)
        finally:
            _stop(process)
            supervisor.remove_regions(prefix)


def _keeps_engines(repository: Path) -> bool:
    config = repository / "dit_transformer" / "config.pbtxt"
    return config.is_file() and f'"{ENGINE_CACHE}"' in config.read_text("utf-8", "replace")


def _command(
    server: ServerBinary, models: Path, backends: Path, host: str, prefix: str
) -> list[str]:
    """The server's command without its addresses; prefix: of its regions of shared memory."""
    names = {*os.environ.get(origin.NAMES, "").split(","), host}
    if not is_loopback(host):
        names |= {socket.gethostname(), socket.getfqdn()}
    environment = server.environment | {origin.NAMES: ",".join(names), origin.FORWARDS: "1"}
    # Requests to closed endpoints need a header named "for:nobody". No client can send it, because
    # a header's name ends at the first colon. So it does not matter that other users of this
    # machine can read the header's value among the arguments.
    closed = [
        f"--{option}={_CLOSED}:for:nobody={secrets.token_urlsafe()}"
        for option in ("http-restricted-api", "grpc-restricted-protocol")
    ]
    return [
        # The program env sets the variables, because the supervisor's Python must not have them.
        *("env", *(f"{name}={value}" for name, value in environment.items())),
        str(server.path),
        f"--model-repository={models}",
        f"--backend-directory={backends}",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
        f"--http-header-forward-pattern={origin.HTTP_HEADERS}",
        f"--grpc-header-forward-pattern={origin.GRPC_HEADERS}",
        *closed,
        "--disable-auto-complete-config",
        "--exit-timeout-secs=5",
    ]


@contextmanager
def _output(log: Path | None) -> Iterator[int]:
    """A descriptor for the server's output: the log, or a pipe whose lines are printed escaped."""
    if log is not None:
        with log.open("wb") as file:
            yield file.fileno()
        return
    reading, writing = os.pipe()

    def show() -> None:
        with os.fdopen(reading, "rb") as lines:
            while line := lines.readline(_LONGEST_LINE):
                say(line.decode("utf-8", "replace").rstrip("\r\n"), sys.stderr)

    shown = threading.Thread(target=show, daemon=True)
    shown.start()
    try:
        yield writing
    finally:
        os.close(writing)
        shown.join(1.0)


def _wait_until_ready(
    process: subprocess.Popen[bytes], address: str, seconds: float, log: Path | None
) -> None:
    # No proxy, because a proxy cannot reach this machine's own addresses.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (code := process.poll()) is not None:
            raise ServerFailed(f"the server ended with code {code} before it was ready", log)
        try:
            with direct.open(f"http://{address}/v2/health/ready", timeout=5):
                return
        except (OSError, HTTPException):
            time.sleep(0.1)
    raise ServerFailed(f"the server was not ready after {seconds:g} s", log)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the server and all its helpers. A second Ctrl-C kills them without waiting."""
    assert process.stdin is not None
    try:
        process.stdin.close()  # which tells the supervisor to end
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def choose_ports(host: str, ports: Sequence[int]) -> tuple[int, ...]:
    """``ports`` with a free one in place of each 0; all are different and can be listened on.

    Raises ValueError for a port that is out of range, taken, or given twice.
    """
    chosen = list(ports)
    with ExitStack() as held:  # all stay open until the end, so that no port is chosen twice
        for i in sorted(range(len(ports)), key=lambda i: ports[i] == 0):  # the given ones first
            if not 0 <= ports[i] < 65536:
                raise ValueError(f"port {ports[i]}: allowed is 0 (any free one) to 65535")
            if ports[i] and ports.count(ports[i]) > 1:
                raise ValueError(f"port {ports[i]} is given twice")
            listener = held.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, ports[i]))
                listener.listen(1)  # with SO_REUSEADDR, only this tells whether the port is free
            except OSError as error:
                reason = error.strerror or error
                raise ValueError(f"{host}:{ports[i]}: cannot be listened on: {reason}") from None
            chosen[i] = listener.getsockname()[1]
    return tuple(chosen)
