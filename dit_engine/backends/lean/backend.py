"""The lean backend: packed weights and fused operators. On CUDA each step is one graph, and on the
CPU a forward is a recording of its native calls."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dit_engine.backends import Backend, FusedDenoiser
from dit_engine.backends.eager import DTYPES
from dit_engine.backends.lean.conditioning import Conditioning, ModulationTable
from dit_engine.backends.lean.forward import Activations, LeanTransformer
from dit_engine.backends.lean.vae import LeanDecoder
from dit_engine.errors import BackendUnavailable
from dit_engine.model import DiT
from dit_kernels.chooser import choosing
from dit_kernels.cpu.recording import Recording, record
from dit_kernels.dispatch import launcher, why_not
from dit_kernels.quantized import quantized_why_not

if TYPE_CHECKING:
    from dit_engine.backends.lean.cuda_graphs import StepGraph

# Between quantised products, activations are bfloat16.
QUANTIZED = {"int8": torch.bfloat16, "fp8": torch.bfloat16}


class LeanBackend(Backend):
    """Runs the model with packed weights and fused operators.

    In float32 on the CPU, an image's bits do not depend on the batch: if the matrix product
    does not guarantee that, images are computed one by one, as in the eager backend.

    Warns if the fused operators (native on a CPU, Triton on a GPU) cannot run, with the reason.
    Raises BackendUnavailable for "int8" or "fp8" on a device without such products.
    """

    decoder = LeanDecoder

    def __init__(self, model: DiT, precision: str, device: torch.device) -> None:
        choosing()  # refuses another value of its variable, also where nothing is chosen
        quantized = precision if precision in QUANTIZED else None
        if quantized and (reason := quantized_why_not(quantized, device)) is not None:
            raise BackendUnavailable(f"precision {precision!r}: {reason}")
        kernels = "native" if device.type == "cpu" else "triton"
        if (reason := why_not(kernels, "attention", device)) is not None:
            warnings.warn(
                f"lean runs without its {kernels} kernels, on slower torch references: {reason}",
                stacklevel=2,
            )
        self.dtype = QUANTIZED.get(precision) or DTYPES[precision]
        self.device, self.config = device, model.config
        with torch.inference_mode():
            self.conditioning = Conditioning(model, self.dtype, device)
            self.transformer = LeanTransformer(model, self.dtype, device, quantized)
        self.by_label = device.type == "cpu" and self.dtype == torch.float32
        self.one_by_one = self.by_label and not self.transformer.rows_are_independent
        self.update = launcher("guided_step", device)
        self.graphs = None
        if device.type == "cuda":
            from dit_engine.backends.lean.choices import by_measurement
            from dit_engine.backends.lean.cuda_graphs import step_graphs

            self.transformer.parts = by_measurement(self.transformer)
            self.graphs = step_graphs(self.transformer)

    def prepare(self, labels: Tensor, timesteps: Tensor) -> LeanDenoiser:
        table = ModulationTable(self.conditioning, labels, timesteps, self.by_label)
        return LeanDenoiser(self, table)

    def fuse(
        self,
        labels: Tensor,
        timesteps: Tensor,
        coefficients: np.ndarray,
        scales: Tensor,
        guided_channels: int,
    ) -> FusedLeanDenoiser:
        denoiser = self.prepare(labels, timesteps)
        return FusedLeanDenoiser(denoiser, coefficients, scales, guided_channels)


class LeanDenoiser:
    """The lean forward with labels and time steps fixed; it has buffers that all steps share."""

    def __init__(self, backend: LeanBackend, table: ModulationTable) -> None:
        self.backend, self.table = backend, table
        self._tokens: dict[int, Tensor] = {}
        self._recorded: RecordedForwards | None = None
        if backend.device.type == "cpu" and backend.transformer.native:
            self._recorded = RecordedForwards(backend.transformer, len(table.index))

    def __call__(self, x: Tensor, step: int) -> Tensor:
        """Latents (M, C, S, S) → (M, C_out, S, S) in x's dtype."""
        with torch.inference_mode():
            output = self.forward(x, step, len(x))
            return self.backend.transformer.unpatchify(output).to(x.dtype)

    def forward(self, x: Tensor, step: int, rows: int) -> Tensor:
        """Latents x (M or M/2, C, S, S) → the final layer's tokens (M, T, p·p·C_out), M = ``rows``.
        If x has only M/2 rows, both halves of the batch start from it."""
        if self._recorded is not None:
            return self._recorded(x, self.table, step, rows)
        transformer, modulation = self.backend.transformer, self.table.step(step, rows)
        if rows not in self._tokens:
            shape = rows, transformer.config.num_tokens, transformer.config.hidden_size
            device = self.backend.device
            self._tokens[rows] = torch.empty(*shape, dtype=transformer.dtype, device=device)
        tokens = self._tokens[rows]  # (M, T, D)
        if not self.backend.one_by_one:
            transformer.embed(x, tokens)
            return transformer.forward(tokens, modulation)
        for half in tokens.split(max(len(x), 1)):
            for z, into in zip(x.split(1), half.split(1), strict=True):
                transformer.embed(z, into)
        each = zip(tokens.split(1), modulation.split(1), strict=True)
        return torch.cat([transformer.forward(*row) for row in each])


class RecordedForwards:
    """Forwards on the CPU of up to ``rows`` rows in one set of buffers. The native calls are
    recorded for each number of rows; then they are only replayed.

    Beside the modulations, the buffers hold 7·M·T·D numbers, and 5·M·T·D bytes of codes where the
    forward is quantised. For one thread at a time.
    """

    def __init__(self, transformer: LeanTransformer, rows: int) -> None:
        self.transformer = transformer
        config, dtype = transformer.config, transformer.dtype
        d, wide = config.hidden_size, max(3 * config.hidden_size, config.mlp_hidden_size)
        tokens = rows * config.num_tokens
        self._narrow = torch.empty(3, rows, config.num_tokens, d, dtype=dtype)
        self._wide = torch.empty(tokens * wide, dtype=dtype)
        self._modulation = torch.empty(rows, (6 * config.depth + 2) * d, dtype=dtype)
        self._codes = self._scales = torch.empty(0)
        if transformer.quantized:
            self._codes = torch.empty(tokens * (d + config.mlp_hidden_size), dtype=torch.uint8)
            self._scales = torch.empty(2, rows, config.num_tokens, dtype=torch.float32)
        self._recordings: dict[int, Recording] = {}

    def __call__(self, x: Tensor, table: ModulationTable, step: int, rows: int) -> Tensor:
        """As `LeanDenoiser.forward`."""
        transformer = self.transformer
        tokens, narrow, attended = self._narrow[:, :rows]
        modulation = table.step(step, rows, out=self._modulation[:rows])
        transformer.embed(x, tokens)
        recording = self._recordings.get(rows)
        if recording is not None:
            recording.replay()
        else:
            memory = self._activations(rows, narrow, attended)
            with record() as recording:
                transformer.trunk(tokens, modulation, memory)
            self._recordings[rows] = recording
        return transformer.final(narrow)

    def _activations(self, rows: int, narrow: Tensor, attended: Tensor) -> Activations:
        config = self.transformer.config
        d, hidden = config.hidden_size, config.mlp_hidden_size

        def of(memory: Tensor, first: int, width: int) -> Tensor:
            """A view (M, T, width) of ``memory`` behind its first M·T·``first`` numbers."""
            count = rows * config.num_tokens
            part = memory[count * first : count * (first + width)]
            return part.view(rows, config.num_tokens, width)

        made = Activations(narrow, attended, of(self._wide, 0, 3 * d), of(self._wide, 0, hidden))
        if self.transformer.quantized:
            made.codes = of(self._codes, 0, d), self._scales[0, :rows]
            made.hidden_codes = of(self._codes, d, hidden), self._scales[1, :rows]
        return made


class FusedLeanDenoiser(FusedDenoiser):
    """See `dit_engine.backends.FusedDenoiser`. On CUDA it takes one graph until it is released, or
    two if only some of the steps are guided."""

    def __init__(
        self, denoiser: LeanDenoiser, coefficients: np.ndarray, scales: Tensor, channels: int
    ) -> None:
        self._taken: dict[bool, StepGraph | None] = {}  # guided or not → its graph
        self.denoiser, self.channels = denoiser, channels
        device = denoiser.backend.device
        self.coefficients = torch.from_numpy(coefficients).float().to(device)  # (steps, 9)
        self.scales = scales.float().to(device)  # (N,)

    def guided_step(
        self, z: Tensor, x0_before: Tensor, noise: Tensor | None, step: int, guide: bool
    ) -> tuple[Tensor, Tensor]:
        denoiser, backend = self.denoiser, self.denoiser.backend
        if (graph := self._graph(guide)) is not None:
            return graph(z, x0_before, noise, step)
        tokens = denoiser.forward(z, step, len(z) * (2 if guide else 1))
        return backend.update(
            tokens, z, x0_before, z if noise is None else noise, self.scales,
            self.coefficients[step], self.channels, backend.config.patch_size,
        )  # fmt: skip

    def _graph(self, guide: bool) -> StepGraph | None:
        graphs = self.denoiser.backend.graphs
        if graphs is None:
            return None
        if guide not in self._taken:
            graph = self._taken[guide] = graphs.take((len(self.scales), guide, self.channels))
            if graph is not None:
                graph.start(self.denoiser.table, self.coefficients, self.scales)
        return self._taken[guide]

    def release(self) -> None:
        while self._taken:
            _, graph = self._taken.popitem()
            if graph is not None:
                graph.release()

    def __del__(self) -> None:
        if not sys.is_finalizing():  # at the end of the process the device may be gone
            self.release()
