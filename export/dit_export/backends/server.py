"""Backend "triton://host:port": the transformer runs on a Triton Inference Server.

The sampling loop stays here. Each step is one request: to "dit_guided_step" if that graph guides
the channels that are asked for, else to "dit_transformer", and the step is then taken here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_engine.arguments import shown
from dit_engine.backends import Backend
from dit_engine.io.json_files import check_schema, parse_json
from dit_engine.model import DiT
from dit_export.server.remote import RemoteServer
from dit_export.source import weights_hash
from dit_kernels.reference import guided_step

TRANSFORMER, STEP = "dit_transformer", "dit_guided_step"
_CONFIG = {
    "": {"max_batch_size": "count", "parameters?": "object"},
    "parameters": {"<text>": "object"},
    "parameters{}": {"string_value?": "text"},
}


class TritonBackend(Backend):
    """See `dit_engine.backends.Backend`.

    Args:
        model: must be the one that the server has; it is not run here.
        precision: must be that of the graphs on the server.
        device: where the results go.
        address: "host:port" for HTTP, "grpc+host:port" for gRPC.

    Raises:
        ValueError: the address is missing or invalid.
        BackendUnavailable: no server answers there, the model is not loaded there, or the server
            has another model or precision.
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
        """Why a served model, with this configuration, cannot be used here; None if it can."""
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
            hashes = f"its weights are {str(served)[:12]}…, this one's {checkpoint[:12]}…"
            return f"is of another model: {hashes}"
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
class RemoteDenoiser:
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
        self, z: Tensor, x0_before: Tensor, noise: Tensor, step: int, guide: bool
    ) -> tuple[Tensor, Tensor]:
        n, backend, row = len(z), self.backend, self.coefficients[step]
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
