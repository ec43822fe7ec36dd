"""Ask a Triton Inference Server for the configurations and the outputs of its models."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from functools import partial
from http.client import HTTPException
from importlib import import_module
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np

from dit_engine.errors import BackendUnavailable
from dit_engine.io.printable import one_line

CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 600.0
TOTAL_SECONDS = 1200.0  # for a request over HTTP; ANSWER_SECONDS are between two packets
# An answer may have some times as many bytes as its request: it has about as many numbers, but as
# text they take five times the space.
_TIMES_THE_QUESTION, _LEAST_BYTES = 16, 16 * 2**20
_BLOCK_BYTES = 2**16
_TYPES = {"float32": "FP32", "int64": "INT64"}
_GRPC = "grpc+"
# The first two are tritonclient's own, which would be lost otherwise. The last: use no proxy.
_DIRECT = [
    ("grpc.max_send_message_length", 2**31 - 1),
    ("grpc.max_receive_message_length", 2**31 - 1),
    ("grpc.enable_http_proxy", 0),
]
_MISTAKES = ("400", "StatusCode.INVALID_ARGUMENT")  # the codes for a client's mistake

T = TypeVar("T")


class RemoteServer:
    """The server at "host:port" (HTTP) or "grpc+host:port". Threads may share it.

    The constructor raises ValueError for an invalid address and ImportError without tritonclient.
    Every request raises one line with the address and the reason: ValueError if the server calls
    the arguments invalid, else `BackendUnavailable`, also for an answer that is far too large or
    cannot be read.
    """

    def __init__(self, address: str) -> None:
        self.address, self.url = address, address.removeprefix(_GRPC)
        host, _, port = self.url.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(
                f"address {address!r}: give host:port, or grpc+host:port, as in localhost:8000"
            )
        self.protocol = "grpc" if address.startswith(_GRPC) else "http"
        try:
            self.module: Any = import_module(f"tritonclient.{self.protocol}")
            self.refused: Any = import_module("tritonclient.utils").InferenceServerException
        except ImportError:
            raise ImportError(
                "tritonclient is not installed: pip install 'dit-engine[triton-client]'"
            ) from None
        self._own = threading.local()  # an HTTP client belongs to the thread that made it

    def config(self, model: str) -> dict[str, Any]:
        """The configuration of a model that is loaded."""
        if not self._ask(lambda client: client.is_model_ready(model)):
            raise self.error(f"model {model!r} is not loaded there")
        if self.protocol == "grpc":
            return self._ask(lambda client: client.get_model_config(model, as_json=True))["config"]
        return self._ask(lambda client: client.get_model_config(model))

    def infer(
        self, model: str, inputs: dict[str, np.ndarray], outputs: list[str]
    ) -> list[np.ndarray]:
        tensors = []
        for name, value in inputs.items():
            tensors.append(self.module.InferInput(name, [*value.shape], _TYPES[value.dtype.name]))
            tensors[-1].set_data_from_numpy(np.ascontiguousarray(value))
        wanted = [self.module.InferRequestedOutput(name) for name in outputs]
        limit = {"client_timeout": ANSWER_SECONDS} if self.protocol == "grpc" else {}
        result = self._ask(lambda client: client.infer(model, tensors, outputs=wanted, **limit))
        return [self._ask(lambda _, name=name: result.as_numpy(name)) for name in outputs]

    def error(self, reason: str) -> BackendUnavailable:
        return BackendUnavailable(f"{self.address}: {reason}")

    def _ask(self, question: Callable[[Any], T]) -> T:
        try:
            return question(self._client())
        except self.refused as error:
            message, status = one_line(error.message()), error.status()
            if status in _MISTAKES:
                raise ValueError(f"{self.address}: {message}") from None
            told = message if status is None else one_line(f"[{status}] {message}")
            if "UNAVAILABLE" in told:  # gRPC's code for a failed connection
                told = f"no Triton Inference Server answers there: {told}"
            raise self.error(told) from None
        except (OSError, HTTPException) as error:  # timeouts too
            reason = one_line(getattr(error, "strerror", None) or error)
            raise self.error(f"no Triton Inference Server answers there: {reason}") from None
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # tritonclient does not check the structure of an answer
            raise self.error(f"its answer cannot be read ({one_line(repr(error))})") from None

    def _client(self) -> Any:
        if not hasattr(self._own, "client"):
            limits: dict[str, Any] = {}
            if self.protocol == "http":  # this client ignores proxies
                limits = {"connection_timeout": CONNECT_SECONDS, "network_timeout": ANSWER_SECONDS}
            elif is_loopback(self.url.rpartition(":")[0]):
                limits = {"channel_args": _DIRECT}
            self._own.client = client = self.module.InferenceServerClient(self.url, **limits)
            if self.protocol == "http":
                client._client_stub = _Bounded(client._client_stub)
        return self._own.client


class _Bounded:
    """tritonclient's HTTP connection with the limits that it lacks, for the size and the time of
    answers."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def get(self, *arguments: Any, **options: Any) -> Any:
        return self._bounded(partial(self._connection.get, *arguments, **options), _LEAST_BYTES)

    def post(self, *arguments: Any, body: bytes, **options: Any) -> Any:
        ask = partial(self._connection.post, *arguments, body=body, **options)
        return self._bounded(ask, _LEAST_BYTES + _TIMES_THE_QUESTION * len(body))

    def _bounded(self, ask: Callable[[], Any], limit: int) -> Any:
        """The parts of a response that tritonclient uses."""
        from gevent import Timeout  # installed with tritonclient's HTTP client

        body = bytearray()
        try:
            with Timeout(TOTAL_SECONDS):
                response = ask()
                if response.get("Content-Encoding") is not None:
                    raise ValueError("it is compressed, though we did not ask for that")
                while block := response.read(_BLOCK_BYTES):
                    body += block
                    if len(body) > limit:
                        raise ValueError(f"it has more than {limit >> 20} MiB")
        except Timeout:
            raise ValueError(f"it took more than {TOTAL_SECONDS:g} seconds") from None
        data = io.BytesIO(body)
        return SimpleNamespace(
            status_code=response.status_code, get=response.get,
            read=lambda length=-1: data.read(length),
        )  # fmt: skip


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself, which no proxy can reach."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
