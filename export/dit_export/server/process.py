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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from dit_engine.io.caches import private_cache
from dit_engine.io.printable import say
from dit_export.server import origin, supervisor
from dit_export.server.binary import ServerBinary, assemble_backends
from dit_export.server.configuration import ENGINE_CACHE
from dit_export.server.repository import check_marker
from dit_export.server.trust import check_repository, served_copy

_STOP_SECONDS = supervisor.ASK_SECONDS + 5
# No client of ours needs these endpoints. Before Triton 25.07, clients could read and overwrite the
# memory of the Python backend through the first.
_CLOSED = "shared-memory,model-repository,trace,logging"


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
    show: Callable[[str], object] | None = None,
    trust: bool = False,
) -> Iterator[Running]:
    """Start a server for ``repository``, wait until it is ready, and stop it when the block ends.

    If this process is killed, the server ends too (see `supervisor`). A warning says if other
    machines can reach ``host``.

    Args:
        ports: for HTTP, gRPC and metrics; 0 means any free port.
        ready_seconds: the time that loading and warming up may take.
        show: is called, in another thread, with each line that the server prints; None means that
            they are printed on standard error.
        trust: run whatever code the repository has (otherwise see `trust.check_repository`).

    Raises ValueError for a repository that is not ours or has other code and for a port that is
    invalid or taken, and OSError if the server ended or was not ready in time.
    """
    check_marker(repository)
    files = None if trust else check_repository(repository)
    chosen = choose_ports(host, ports)
    if not origin.is_loopback(host):
        warnings.warn(
            f"whoever reaches {host} can ask this server for images and, if it is older than "
            "Triton 25.07, end it with one request: it is meant for your own machine only",
            stacklevel=3,
        )
    prefix = f"dit-{secrets.token_hex(8)}-"
    with tempfile.TemporaryDirectory(prefix="triton-") as folder, _output(show) as output:
        models, backends, here = (Path(folder) / name for name in ("models", "backends", "here"))
        for made in (models, backends, here):
            made.mkdir()
        served = repository if files is None else served_copy(repository, files, models)
        with suppress(OSError, ValueError):  # without a private cache, nothing is kept
            config = (served / "dit_transformer" / "config.pbtxt").read_text("utf-8")
            if f'"{ENGINE_CACHE}"' in config:
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
            _wait_until_ready(process, http, ready_seconds)
            supervisor.hide_regions(prefix)
            yield Running(http, grpc, metrics, process)
        finally:
            _stop(process, prefix)


def _command(
    server: ServerBinary, models: Path, backends: Path, host: str, prefix: str
) -> list[str]:
    """The server's command without its addresses; prefix: of its regions of shared memory."""
    names = {*os.environ.get(origin.NAMES, "").split(","), host}
    if not origin.is_loopback(host):
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
        # The program `env` sets the variables, because the supervisor's Python must not get them.
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
def _output(show: Callable[[str], object] | None) -> Iterator[int]:
    """A descriptor for a server's output; show: see `running_server`."""
    reading, writing = os.pipe()

    def read() -> None:
        with os.fdopen(reading, "rb") as lines:
            while data := lines.readline(1 << 16):
                line = data.decode("utf-8", "replace").rstrip("\r\n")
                say(line, sys.stderr) if show is None else show(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield writing
    finally:
        os.close(writing)
        reader.join(1.0)


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, seconds: float) -> None:
    # No proxy, because a proxy cannot reach this machine's own addresses.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (code := process.poll()) is not None:
            raise OSError(f"the server ended with code {code} before it was ready")
        try:
            with direct.open(f"http://{address}/v2/health/ready", timeout=5):
                return
        except (OSError, HTTPException):
            time.sleep(0.1)
    raise OSError(f"the server was not ready after {seconds:g} s")


def _stop(process: subprocess.Popen[bytes], prefix: str) -> None:
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
        supervisor.remove_regions(prefix)


def choose_ports(host: str, ports: Sequence[int]) -> tuple[int, ...]:
    """``ports`` with a free one in place of each 0; all are different and can be listened on.

    Raises ValueError for a port that is out of range, taken, or given twice.
    """
    chosen = list(ports)
    with ExitStack() as held:  # sockets stay open until the end, so that all ports are different
        for i, port in sorted(enumerate(ports), key=lambda each: each[1] == 0):  # given ones first
            try:
                listener = held.enter_context(socket.create_server((host, port)))
            except (OSError, OverflowError) as error:
                reason = getattr(error, "strerror", None) or error
                raise ValueError(f"{host}:{port}: cannot be listened on: {reason}") from None
            chosen[i] = listener.getsockname()[1]
    return tuple(chosen)
