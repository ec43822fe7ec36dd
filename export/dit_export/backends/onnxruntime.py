"""The onnxruntime backend: the conditioner graph before the loop, the denoiser graph inside."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from torch import Tensor

from dit_engine.backends import Backend, Denoiser
from dit_engine.backends.lean.conditioning import TABLE_BYTES
from dit_engine.errors import BackendUnavailable
from dit_engine.model import DiT
from dit_export.bundle import Bundle
from dit_export.cache import cached_export
from dit_export.onnx.export import ExportOptions
from dit_export.onnx.files import check_metadata, require_onnx
from dit_export.onnx.graphs import modulation_width
from dit_export.onnx.sessions import Session, check_device
from dit_export.source import weights_hash

GRAPHS = ("conditioner", "denoiser")


class OnnxRuntimeBackend(Backend):
    """The first use exports the model to a cache directory (`dit_export.cache`).

    Args:
        address: an export of this model to run instead, as in "onnxruntime:///path/to/export".

    Raises:
        BackendUnavailable: a device or precision that onnxruntime cannot run.
        ValueError: ``address`` is no export, is damaged, or is one of another model.
        ImportError: a package of the extra "onnx" is missing.
    """

    def __init__(
        self, model: DiT, precision: str, device: torch.device, address: str | None = None
    ) -> None:
        require_onnx()
        check_device(device)
        if precision == "bf16" and device.type == "cpu":
            raise BackendUnavailable(
                "precision 'bf16': onnxruntime has no bfloat16 operators for the CPU; "
                "use fp32, fp16 or int8"
            )
        self.device, self.config = device, model.config
        if address is None:
            self.bundle = cached_export(model, ExportOptions(precision, graphs=GRAPHS))
        else:
            self.bundle = _opened(address, model, precision)
        self._sessions: tuple[int, dict[str, Session]] | None = None
        self._lock = threading.Lock()

    def prepare(self, labels: Tensor, timesteps: Tensor) -> Denoiser:
        return OnnxDenoiser(self, self._of_threads(torch.get_num_threads()), labels, timesteps)

    def _of_threads(self, threads: int) -> dict[str, Session]:
        """Sessions with torch's number of threads, which the engine sets while it generates."""
        with self._lock:
            if self._sessions is None or self._sessions[0] != threads:
                made = {g: Session(self.bundle.file(g), self.device, threads) for g in GRAPHS}
                self._sessions = (threads, made)
            return self._sessions[1]


class OnnxDenoiser:
    """The denoiser graph with its conditions fixed."""

    def __init__(
        self,
        backend: OnnxRuntimeBackend,
        sessions: dict[str, Session],
        labels: Tensor,
        timesteps: Tensor,
    ) -> None:
        self.config, self.device, self.sessions = backend.config, backend.device, sessions
        self.labels = labels.to(self.device)  # (N,)
        self.timesteps = timesteps.to(self.device)
        self.width = modulation_width(backend.config)
        row = 4 * self.width * max(1, len(labels))
        self.chunk = max(1, min(len(timesteps), TABLE_BYTES // row))
        self._first = -1
        self._table = torch.empty(0)

    def __call__(self, x: Tensor, step: int) -> Tensor:
        """Latents (M, C, S, S) → (M, C_out, S, S) in x's dtype, memory of the caller's own."""
        m, s = len(x), self.config.input_size
        shape = (m, self.config.out_channels, s, s)
        output = torch.empty(shape, dtype=torch.float32, device=self.device)
        if m > 0:
            inputs = {"x": x.float().contiguous(), "modulations": self._modulations(step)[:m]}
            self.sessions["denoiser"].run(inputs, {"output": output})
        return output.to(x.dtype)

    def _modulations(self, step: int) -> Tensor:
        """Of every row at ``step``, (N, width); some steps are computed at a time.

        Equal labels are computed more than once, at 0.2 % of the denoiser's cost, so that each
        step's rows lie as they are bound, and the table is all the memory that it takes.
        """
        first = step - step % self.chunk
        if first != self._first:
            self._table = torch.empty(0)  # freed before the next one is made
            t = self.timesteps[first : first + self.chunk]  # (K,)
            k, n = len(t), len(self.labels)
            rows = torch.empty(k * n, self.width, dtype=torch.float32, device=self.device)
            inputs = {"t": t.repeat_interleave(n), "y": self.labels.repeat(k)}
            self.sessions["conditioner"].run(inputs, {"modulations": rows})
            self._table, self._first = rows.view(k, n, self.width), first
        return self._table[step - first]


def _opened(address: str, model: DiT, precision: str) -> Bundle:
    bundle = Bundle.open(Path(address))
    for graph in GRAPHS:
        bundle.graph(graph)
    if bundle.config != model.config or bundle.checkpoint != weights_hash(model):
        raise ValueError(f"{address}: an export of another model")
    if bundle.dtype != precision:
        raise ValueError(
            f"{address}: an export in {bundle.dtype}; precision {precision!r} is asked"
        )
    for graph in GRAPHS:
        check_metadata(bundle, graph)
    return bundle
