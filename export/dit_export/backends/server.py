"""Backend "triton://host:port": the transformer runs on a Triton Inference Server.

The sampling loop stays here; each step is one request, to "dit_guided_step" where the step is
guided as that graph guides, else to "dit_transformer".
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_engine.arguments import shown
from dit_engine.backends import Backend
from dit_engine.errors import BackendUnavailable
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
        precision: of the graphs on the server.
        device: where the results go.
        address: "host:port" for HTTP, "grpc+host:port" for gRPC.

    Raises:
        ValueError: no address, or one that cannot be.
        BackendUnavailable: no server there, the model not loaded, or another model or precision.
    """

    def __init__(self, model: DiT, precision: str, device: torch.device, address: str = "") -> None:
        if not address:
            raise ValueError("backend 'triton' needs an address: triton://host:port")
        self.server, self.device, self.config = RemoteServer(address), device, model.config
        checkpoint = weights_hash(model)
        served = {name: self.server.config(name) for name in (TRANSFORMER, STEP)}
        for name, config in served.items():
            self._check(name, config, checkpoint, precision)
        self.largest = min(config["max_batch_size"] for config in served.values())
        guided = _parameter(served[STEP], "guided_channels") or "0"
        if guided not in map(str, range(self.config.in_channels + 1)):
            raise BackendUnavailable(
                f"{self.server.address}: its {STEP} has guided_channels {shown(guided)} of "
                f"{self.config.in_channels}"
            )
        self.guided_channels = int(guided)

    def _check(self, name: str, config: dict[str, Any], checkpoint: str, precision: str) -> None:
        there = f"{self.server.address}: its {name}"
        try:
            check_schema(config, _CONFIG, there)
            model = parse_json(_parameter(config, "model") or "null", f"{there}: model")
        except ValueError as error:
            raise BackendUnavailable(str(error)) from None
        if config["max_batch_size"] < 1:
            raise BackendUnavailable(f"{there} takes no batches (max_batch_size 0)")
        served, dtype = _parameter(config, "checkpoint"), _parameter(config, "dtype")
        if served != checkpoint:
            raise BackendUnavailable(
                f"{there} is of another model: its weights are {str(served)[:12]}…, "
                f"this one's {checkpoint[:12]}…"
            )
        if model != self.config.to_dict():
            raise BackendUnavailable(f"{there} has these weights with another config")
        if dtype != precision:
            raise BackendUnavailable(
                f"precision {precision!r}: {there} is in {dtype!r}; ask for that"
            )

    def prepare(self, labels: Tensor, timesteps: Tensor) -> TritonDenoiser:
        return TritonDenoiser(self, labels, timesteps)

    def fuse(
        self,
        labels: Tensor,
        timesteps: Tensor,
        coefficients: np.ndarray,
        scales: Tensor,
        guided_channels: int,
    ) -> FusedTritonDenoiser:
        denoiser = self.prepare(labels, timesteps)
        return FusedTritonDenoiser(denoiser, coefficients, scales, guided_channels)

    def infer(
        self, model: str, inputs: dict[str, np.ndarray], outputs: list[str], channels: int
    ) -> list[Tensor]:
        """In as many requests as the server's largest batch asks for.

        Raises `BackendUnavailable` unless every output is float32 of (N, channels, S, S).
        """
        n, side = len(next(iter(inputs.values()))), self.config.input_size
        parts = []
        for i in range(0, n, self.largest):
            part = {name: value[i : i + self.largest] for name, value in inputs.items()}
            shape = (min(self.largest, n - i), channels, side, side)
            answer = self.server.infer(model, part, outputs)
            for name, value in zip(outputs, answer, strict=True):
                if not isinstance(value, np.ndarray):
                    raise BackendUnavailable(f"{self.server.address}: {model} gave no {name}")
                if value.dtype != np.float32 or value.shape != shape:
                    raise BackendUnavailable(
                        f"{self.server.address}: {model} gave {name} as {value.dtype} "
                        f"{value.shape}; float32 {shape} is needed"
                    )
            parts.append(answer)
        columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        return [torch.from_numpy(column).to(self.device) for column in columns]


class TritonDenoiser:
    def __init__(self, backend: TritonBackend, labels: Tensor, timesteps: Tensor) -> None:
        self.backend = backend
        self.labels = labels.cpu().numpy().astype(np.int64)  # (N,) or, guided, (2N,)
        self.timesteps = timesteps.cpu().numpy().astype(np.int64)  # (steps,)

    def __call__(self, x: Tensor, step: int) -> Tensor:
        if len(x) == 0:  # no request holds it
            return x.new_empty(0, self.backend.config.out_channels, *x.shape[2:])
        inputs = {"x": _array(x), **self.conditions(len(x), step)}
        channels = self.backend.config.out_channels
        (output,) = self.backend.infer(TRANSFORMER, inputs, ["output"], channels)
        return output.to(x.dtype)

    def conditions(self, rows: int, step: int) -> dict[str, np.ndarray]:
        t = np.full((rows, 1), self.timesteps[step])
        return {"t": t, "y": self.labels[:rows, None]}


class FusedTritonDenoiser:
    """See `dit_engine.backends.FusedDenoiser`."""

    def __init__(
        self, denoiser: TritonDenoiser, coefficients: np.ndarray, scales: Tensor, channels: int
    ) -> None:
        self.denoiser, self.channels = denoiser, channels
        self.coefficients = coefficients.astype(np.float32)
        self.scales = scales.float().cpu()

    def guided_step(
        self, z: Tensor, x0_before: Tensor, noise: Tensor, step: int, guide: bool
    ) -> tuple[Tensor, Tensor]:
        if len(z) == 0:
            return z, z
        if guide and self.channels == self.denoiser.backend.guided_channels:
            return self._there(z, x0_before, noise, step)
        return self._here(z, x0_before, noise, step, guide)

    def _there(
        self, z: Tensor, x0_before: Tensor, noise: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        n = len(z)
        inputs = {
            "z": _array(z),
            "x0_before": _array(x0_before),
            "noise": _array(noise),
            **self.denoiser.conditions(n, step),
            "guidance_scale": self.scales.numpy()[:, None],
            "coefficients": np.tile(self.coefficients[step], (n, 1)),
        }
        backend = self.denoiser.backend
        after, x0 = backend.infer(STEP, inputs, ["z_next", "x0"], backend.config.in_channels)
        return after, x0

    def _here(
        self, z: Tensor, x0_before: Tensor, noise: Tensor, step: int, guide: bool
    ) -> tuple[Tensor, Tensor]:
        """Unguided, or guided on other channels than the server's graph guides."""
        output = self.denoiser(torch.cat([z, z]) if guide else z, step)  # (M, C_out, S, S)
        tokens = output.flatten(2).transpose(1, 2)  # one a latent pixel, (M, S·S, C_out)
        return guided_step(
            tokens, z, x0_before, noise, self.scales.to(z.device),
            torch.from_numpy(self.coefficients[step]), self.channels, patch_size=1,
        )  # fmt: skip


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _parameter(config: dict[str, Any], name: str) -> str | None:
    return config.get("parameters", {}).get(name, {}).get("string_value")
