"""Backend "triton://host:port": the transformer runs on a Triton Inference Server.

The sampling loop stays here. Each step is one request, to "dit_guided_step" if that graph guides
the channels that are asked for; else it goes to "dit_transformer", and the step is taken here.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_engine.arguments import shown
from dit_engine.backends import Backend, FusedDenoiser
from dit_engine.errors import BackendUnavailable
from dit_engine.io.json_files import check_schema, parse_json
from dit_engine.io.printable import one_line
from dit_engine.model import DiT
from dit_export.server.origin import is_loopback
from dit_export.source import weights_hash
from dit_kernels.reference import guided_step

TRANSFORMER, STEP = "dit_transformer", "dit_guided_step"
_CONFIG = {
    "": {"max_batch_size": "count", "parameters?": "object"},
    "parameters": {"<text>": "object"},
    "parameters{}": {"string_value?": "text"},
}
ANSWER_SECONDS = 600.0  # over HTTP, between two packets
TOTAL_SECONDS = 1200.0  # for a request over HTTP
# An answer may have several times as many bytes as its request: it has about as many numbers, but
# as text they take five times the space.
_TIMES_THE_QUESTION, _LEAST_BYTES = 16, 16 * 2**20
_TYPES = {"float32": "FP32", "int64": "INT64"}
# The first two are tritonclient's own, which would be lost otherwise. The last: use no proxy.
_DIRECT = [
    ("grpc.max_send_message_length", 2**31 - 1),
    ("grpc.max_receive_message_length", 2**31 - 1),
    ("grpc.enable_http_proxy", 0),
]


class TritonBackend(Backend):
    """See `dit_engine.backends.Backend`.

    Args:
        model: must be the one that the server has; it is not run here.
        precision: must be that of the graphs on the server.
        device: where the results go.
        address: "host:port" for HTTP, "grpc+host:port" for gRPC.

    Raises ValueError for an invalid address, and `BackendUnavailable` if no server answers there
    that has this model in this precision.
    """

    def __init__(self, model: DiT, precision: str, device: torch.device, address: str = "") -> None:
        if not address:
            raise ValueError("backend 'triton' needs an address: triton://host:port")
        self.server, self.device, self.config = RemoteServer(address), device, model.config
        checkpoint = weights_hash(model)
        served = {name: self.server.config(name) for name in (TRANSFORMER, STEP)}
        for name, config in served.items():
            if (reason := self._difference(config, checkpoint, precision)) is not None:
                raise self.server.error(f"its {name} {reason}")
        self.largest = min(config["max_batch_size"] for config in served.values())
        self.guided_channels = int(_parameter(served[STEP], "guided_channels") or 0)

    def _difference(self, config: dict[str, Any], checkpoint: str, precision: str) -> str | None:
        """Why a served model with this configuration cannot be used here; None if it can."""
        try:
            check_schema(config, _CONFIG, "config")
            model = parse_json(_parameter(config, "model") or "null", "its parameter 'model'")
        except ValueError as error:
            return f"cannot be used: {error}"
        served, dtype = _parameter(config, "checkpoint"), _parameter(config, "dtype")
        guided, most = _parameter(config, "guided_channels") or "0", self.config.in_channels
        if config["max_batch_size"] < 1:
            return "takes no batches (max_batch_size 0)"
        if served != checkpoint:
            return f"is of another model, {str(served)[:12]}… and not {checkpoint[:12]}…"
        if model != self.config.to_dict():
            return "has these weights with another config"
        if dtype != precision:
            return f"is in {dtype!r}: ask for that precision, not for {precision!r}"
        if guided not in map(str, range(most + 1)):
            return f"has guided_channels {shown(guided)} of {most}"
        return None

    def prepare(self, labels: Tensor, timesteps: Tensor) -> RemoteDenoiser:
        return self.fuse(labels, timesteps, np.empty((0, 9)), torch.empty(0), 0)

    def fuse(
        self,
        labels: Tensor,
        timesteps: Tensor,
        coefficients: np.ndarray,
        scales: Tensor,
        guided_channels: int,
    ) -> RemoteDenoiser:
        y, t = (each.cpu().numpy().astype(np.int64) for each in (labels, timesteps))
        table, scales = coefficients.astype(np.float32), scales.float().cpu()
        return RemoteDenoiser(self, y, t, table, scales, guided_channels)

    def infer(
        self, model: str, inputs: dict[str, np.ndarray], outputs: list[str], channels: int
    ) -> list[Tensor]:
        """Outputs of a model on the server, in as many requests as its largest batch needs.

        Raises `BackendUnavailable` unless every output is float32 of (N, channels, S, S).
        """
        n, side = len(next(iter(inputs.values()))), self.config.input_size
        parts = []
        for i in range(0, n, self.largest):
            part = {name: value[i : i + self.largest] for name, value in inputs.items()}
            shape = (min(self.largest, n - i), channels, side, side)
            parts.append(self.server.infer(model, part, outputs))
            for name, value in zip(outputs, parts[-1], strict=True):
                if not isinstance(value, np.ndarray):
                    raise self.server.error(f"{model} gave no {name}")
                if value.dtype != np.float32 or value.shape != shape:
                    found = f"{value.dtype} {value.shape}; float32 {shape} is needed"
                    raise self.server.error(f"{model} gave {name} as {found}")
        columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        return [torch.from_numpy(column).to(self.device) for column in columns]


@dataclass(frozen=True)
class RemoteDenoiser(FusedDenoiser):
    """See `dit_engine.backends.Denoiser` and `FusedDenoiser`. labels: (N,), or (2N,) with guidance;
    timesteps (steps,), coefficients (steps, 9), scales (N,)."""

    backend: TritonBackend
    labels: np.ndarray
    timesteps: np.ndarray
    coefficients: np.ndarray
    scales: Tensor
    channels: int

    def __call__(self, x: Tensor, step: int) -> Tensor:
        inputs = {"x": _array(x), **self._conditions(len(x), step)}
        channels = self.backend.config.out_channels
        (output,) = self.backend.infer(TRANSFORMER, inputs, ["output"], channels)
        return output.to(x.dtype)

    def _conditions(self, rows: int, step: int) -> dict[str, np.ndarray]:
        return {"t": np.full((rows, 1), self.timesteps[step]), "y": self.labels[:rows, None]}

    def guided_step(
        self, z: Tensor, x0_before: Tensor, noise: Tensor | None, step: int, guide: bool
    ) -> tuple[Tensor, Tensor]:
        n, backend, row = len(z), self.backend, self.coefficients[step]
        noise = z if noise is None else noise
        if guide and self.channels == backend.guided_channels:
            inputs = {
                "z": _array(z),
                "x0_before": _array(x0_before),
                "noise": _array(noise),
                **self._conditions(n, step),
                "guidance_scale": self.scales.numpy()[:, None],
                "coefficients": np.tile(row, (n, 1)),
            }
            after, x0 = backend.infer(STEP, inputs, ["z_next", "x0"], backend.config.in_channels)
            return after, x0
        output = self(torch.cat([z, z]) if guide else z, step)  # (M, C_out, S, S)
        tokens = output.flatten(2).transpose(1, 2)  # one per latent pixel, (M, S·S, C_out)
        return guided_step(
            tokens, z, x0_before, noise, self.scales.to(z.device), torch.from_numpy(row),
            self.channels, patch_size=1,
        )  # fmt: skip


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _parameter(config: dict[str, Any], name: str) -> str | None:
    return config.get("parameters", {}).get(name, {}).get("string_value")


class RemoteServer:
    """The server at "host:port" (HTTP) or "grpc+host:port". Threads may share it.

    The constructor raises ValueError for an invalid address and ImportError without tritonclient.
    Every request raises one line with the address and the reason: ValueError if the server calls
    the arguments invalid, else `BackendUnavailable`, also for an answer that is far too large or
    cannot be read.
    """

    def __init__(self, address: str) -> None:
        self.address, self.url = address, address.removeprefix("grpc+")
        host, _, port = self.url.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(
                f"address {address!r}: give host:port, or grpc+host:port, as in localhost:8000"
            )
        self.protocol = "grpc" if address.startswith("grpc+") else "http"
        try:
            self.module: Any = import_module(f"tritonclient.{self.protocol}")
            self.refused: Any = import_module("tritonclient.utils").InferenceServerException
        except ImportError:
            raise ImportError(
                "tritonclient is not installed: pip install 'dit-engine[triton-client]'"
            ) from None
        self._own = threading.local()  # an HTTP client belongs to the thread that made it

    def config(self, model: str) -> dict[str, Any]:
        """The configuration of a loaded model."""
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

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        try:
            return question(self._client())
        except self.refused as error:
            message, status = one_line(error.message()), error.status()
            if status in ("400", "StatusCode.INVALID_ARGUMENT"):
                raise ValueError(f"{self.address}: {message}") from None
            told = message if status is None else one_line(f"[{status}] {message}")
            nobody = "no Triton server answers there: " if "UNAVAILABLE" in told else ""  # gRPC's
            raise self.error(f"{nobody}{told}") from None
        except (OSError, HTTPException) as error:  # timeouts too
            reason = one_line(getattr(error, "strerror", None) or error)
            raise self.error(f"no Triton server answers there: {reason}") from None
        except Exception as error:  # tritonclient does not check the structure of an answer
            raise self.error(f"its answer cannot be read ({one_line(repr(error))})") from None

    def _client(self) -> Any:
        if not hasattr(self._own, "client"):
            limits: dict[str, Any] = {}
            if self.protocol == "http":  # this client ignores proxies
                limits = {"connection_timeout": 10.0, "network_timeout": ANSWER_SECONDS}
            elif is_loopback(self.url.rpartition(":")[0]):
                limits = {"channel_args": _DIRECT}
            self._own.client = client = self.module.InferenceServerClient(self.url, **limits)
            if self.protocol == "http":
                client._client_stub = _Bounded(client._client_stub)
        return self._own.client


class _Bounded:
    """tritonclient's HTTP connection with limits, which it lacks, for the size and the time of
    answers."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._connection, name)
        return partial(self._bounded, found) if name in ("get", "post") else found

    def _bounded(self, ask: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The parts of a response that tritonclient uses."""
        from gevent import Timeout  # installed with tritonclient's HTTP client

        body = bytearray()
        limit = _LEAST_BYTES + _TIMES_THE_QUESTION * len(options.get("body", b""))
        try:
            with Timeout(TOTAL_SECONDS):
                response = ask(*arguments, **options)
                if response.get("Content-Encoding") is not None:
                    raise ValueError("it is compressed, though we did not ask for that")
                while block := response.read(2**16):
                    body += block
                    if len(body) > limit:
                        raise ValueError(f"it has more than {limit >> 20} MiB")
        except Timeout:
            raise ValueError(f"it took more than {TOTAL_SECONDS:g} seconds") from None
        read = io.BytesIO(body).read
        return SimpleNamespace(
            status_code=response.status_code, get=response.get, read=lambda length=-1: read(length)
        )
