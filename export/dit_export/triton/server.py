"""A Triton Inference Server for one's own machine: started, waited for and stopped."""

from __future__ import annotations

import os
import secrets
import shlex
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

from dit_engine.caches import private_cache
from dit_engine.printable import say
from dit_export.triton import origin, supervisor
from dit_export.triton.configuration import ENGINE_CACHE
from dit_export.triton.remote import is_loopback
from dit_export.triton.server_binary import ServerBinary, assemble_backends, find_server
from dit_export.triton.trust import check_marker, check_repository, served_copy

_STOP_SECONDS = supervisor.ASK_SECONDS + 5
_LAST_LINES = 30
_LONGEST_LINE = 1 << 16
# What nobody here asks of a server. With the first, who sends requests has read and overwritten
# memory of the Python backend in versions before 25.07.
_CLOSED = "shared-memory,model-repository,trace,logging"
_RESTRICTIONS = ("http-restricted-api", "grpc-restricted-protocol")


class ServerFailed(RuntimeError):
    """It ended, or was not ready in time. what: that alone, where str() may name its log too."""

    def __init__(self, what: str, log: Path | None) -> None:
        super().__init__(what if log is None else f"{what}; see {log}")
        self.what = what


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
    trust: bool = False,
) -> Iterator[Running]:
    """A server of ``repository``, ready to be asked; it is stopped when the block ends.

    Should this process die without a word, the server goes with it (`supervisor`). Its endpoints
    for shared memory, loading of models, traces and logging are closed, and web pages of others get
    no images (`origin`). Where ``host`` is not this machine alone there is a warning.

    Args:
        ports: HTTP, gRPC and metrics; 0 is any free one.
        ready_seconds: that loading may take: graphs are read from disk and warmed up.
        log: file for what the server prints; None is standard error.
        trust: run the repository's code whatever it is. Without it, it must be what this version
            writes (`trust.check_repository`).

    Raises:
        ValueError: no repository of ours, one with other code, or a port that is taken, or none.
        ServerFailed: it ended, or was not ready in time.
    """
    check_marker(repository)
    texts = None if trust else check_repository(repository)
    chosen = choose_ports(host, ports)
    if not is_loopback(host):
        warnings.warn(
            f"whoever reaches {host} can ask this server for images, and can end it by one request "
            "if it is older than Triton 25.07: it is for one's own machine",
            stacklevel=3,
        )
    prefix = f"dit-{secrets.token_hex(8)}-"
    with tempfile.TemporaryDirectory(prefix="triton-") as folder:
        models, backends, here = (Path(folder) / name for name in ("models", "backends", "here"))
        for made in (models, backends, here):
            made.mkdir()
        served = repository if texts is None else served_copy(repository, texts, models)
        if _keeps_engines(served):
            with suppress(OSError, ValueError):  # without a cache, they go when the server ends
                (here / ENGINE_CACHE).symlink_to(private_cache("triton"))
        names = {origin.NAMES: ",".join(_names(host)), origin.FORWARDS: "1"}
        environment = server.environment | names
        command = [
            *(sys.executable, "-I", "-S", supervisor.__file__, prefix),
            # Not for the supervisor, whose Python needs its own libraries.
            *("env", *(f"{name}={value}" for name, value in environment.items())),
            str(server.path),
            f"--model-repository={served.resolve()}",
            f"--backend-directory={assemble_backends(server, backends)}",
            f"--backend-config=python,shm-region-prefix-name={prefix}",
            f"--http-header-forward-pattern={origin.HTTP_HEADERS}",
            f"--grpc-header-forward-pattern={origin.GRPC_HEADERS}",
            # No header's name has a colon in it, so that nobody can send the key, though any user
            # of this machine can read it among the arguments.
            *(f"--{kind}={_CLOSED}:for:nobody={secrets.token_urlsafe()}" for kind in _RESTRICTIONS),
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
                cwd=here,  # where the Python backend looks for modules before it looks elsewhere
                start_new_session=True,  # Ctrl-C reaches us alone, and we pass it on
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


def _names(host: str) -> set[str]:
    """By which a server may be asked that listens at ``host``, beside addresses and localhost."""
    names = {*os.environ.get(origin.NAMES, "").split(","), host}
    return names if is_loopback(host) else names | {socket.gethostname(), socket.getfqdn()}


def serve(
    repository: Path,
    given: Path | None,
    host: str,
    ports: tuple[int, int, int],
    ready_seconds: float,
    verbose: bool,
    trust: bool,
) -> int:  # pragma: no cover
    """Run a server until Ctrl-C (or SIGTERM); print where it answers once it is ready.

    What the server itself prints goes to standard error: all of it if ``verbose``, else the last
    lines if it fails.
    """
    check_marker(repository)
    server = find_server(given)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with (
            _log_unless(verbose) as log,
            running_server(repository, server, host, ports, ready_seconds, log, trust) as running,
        ):
            say(f"ready: http {running.http}, gRPC {running.grpc}, metrics {running.metrics}")
            client = shlex.quote(str(repository / "client.py"))
            say(f"python {client} {running.http} images.png 50 0; Ctrl-C ends it", flush=True)
            raise ServerFailed(f"the server ended with code {running.process.wait()}", log)
    except KeyboardInterrupt:
        return 0
    except ServerFailed as error:
        raise OSError(error.what) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _log_unless(verbose: bool) -> Iterator[Path | None]:
    """A log for a server, or None if ``verbose``; its last lines are shown if the server fails."""
    if verbose:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="triton-log-") as folder:
        log = Path(folder) / "log"
        try:
            yield log
        except ServerFailed:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            for line in lines[-_LAST_LINES:]:
                say(line, sys.stderr)
            raise


@contextmanager
def _output(log: Path | None) -> Iterator[int]:
    """A descriptor to print to: of the log, or of what is shown line by line, made printable."""
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
    # The environment may name a proxy, which knows nothing of this machine's own addresses.
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
