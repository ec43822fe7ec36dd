"""Whole sampler steps as CUDA graphs: one launch in place of 201 for XL/2 in bf16."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_engine.backends.capture import CapturedGraph, GraphCache, Turns
from dit_engine.backends.lean.conditioning import ModulationTable
from dit_engine.backends.lean.forward import LeanTransformer, Run
from dit_kernels.dispatch import chosen, launcher

Key = tuple[int, bool, int]
"""The number of images, whether they are guided, and the number of guided channels."""


class Where(NamedTuple):
    """The five numbers that `dit_kernels.triton.select_step` reads from device memory."""

    step: int
    table: int  # address
    first: int  # the table's first step
    labels: int
    coefficients: int  # address


def step_graphs(transformer: LeanTransformer) -> GraphCache[Key, StepGraph]:
    return GraphCache(
        transformer.device, partial(StepGraph, transformer), lambda key: f"a batch of {key[0]}"
    )


class StepGraph(CapturedGraph):
    """One captured step of N images.

    The latents are updated in place, and a counter in device memory holds the next step. The step
    after the last one is therefore one launch of the graph and nothing else.
    """

    def __init__(self, transformer: LeanTransformer, key: Key, turns: Turns, pool: Any) -> None:
        super().__init__(key, turns)
        n, guide, self.channels = key
        config, dtype = transformer.config, transformer.dtype
        self.transformer, self.rows = transformer, 2 * n if guide else n

        def static(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=transformer.device)

        self.z, self.x0, self.noise = (static(n, *config.latent_shape) for _ in range(3))
        self.coefficients, self.scales = static(9), static(n)
        width = (6 * config.depth + 2) * config.hidden_size
        self.modulation = static(self.rows, width, dtype=dtype)
        self.tokens = static(self.rows, config.num_tokens, config.hidden_size, dtype=dtype)
        self.label = static(self.rows, dtype=torch.int64)  # index of each row's label in the table
        self.where = static(len(Where._fields), dtype=torch.int64)
        self._known: Where | None = None  # what is in `where`
        self._table: ModulationTable | None = None
        self._coefficients = torch.empty(0)
        self._select: Run | None = None
        if chosen("embed", "auto", transformer.device) == "triton":
            from dit_kernels.triton.select_step import select_step

            self._select = select_step
        self._update: Run = launcher("guided_step", transformer.device)
        transformer.parts(self.rows)  # measured and chosen before the capture
        # The runs before the capture take steps 1 and 2 of a table with no labels.
        spare = static(8, 9)
        here = Where(0, self.modulation.data_ptr(), 0, 0, spare.data_ptr())
        self._write_where(here)
        self.capture(self._step, pool)
        self._known = None

    def _step(self) -> None:
        transformer = self.transformer
        transformer.embed(self.z, self.tokens, self.where[:1])
        if self._select is not None:
            self._select(self.modulation, self.label, self.coefficients, self.where)
        output = transformer.forward(self.tokens, self.modulation)
        self._update(
            output, self.z, self.x0, self.noise, self.scales, self.coefficients, self.channels,
            transformer.config.patch_size, out=(self.z, self.x0),
        )  # fmt: skip

    def start(self, table: ModulationTable, coefficients: Tensor, scales: Tensor) -> None:
        """Begin a generation: coefficients (steps, 9) and scales (N,), float32 on the device."""
        self._table, self._coefficients = table, coefficients
        with self.turns.take(), torch.inference_mode():
            self.label.copy_(table.index[: self.rows])
            self.scales.copy_(scales)

    def __call__(
        self, z: Tensor, x0_before: Tensor, noise: Tensor | None, step: int
    ) -> tuple[Tensor, Tensor]:
        """Take a step, as `dit_engine.backends.FusedDenoiser.guided_step`. The results are in the
        graph's memory; passed to the next call, they are not copied."""
        assert self._table is not None
        coefficients = self._coefficients.data_ptr()
        with self.turns.take(), torch.inference_mode():
            first, chunk = self._table.steps_from(step)
            for own, given in ((self.z, z), (self.x0, x0_before), (self.noise, noise)):
                if given is not None and given is not own:
                    own.copy_(given)
            if self._select is None:  # without Triton: torch cannot read from an address
                self._table.step(step, self.rows, out=self.modulation)
                self.coefficients.copy_(self._coefficients[step])
            here = Where(step - 1, chunk.data_ptr(), first, chunk.shape[1], coefficients)
            self._write_where(here)
            self._known = None
            self.graph.replay()
            self._known = here._replace(step=step)
        return self.z, self.x0

    def _write_where(self, here: Where) -> None:
        """Write the numbers of `Where` that have changed; the host does not wait for the writes."""
        known, self._known = self._known, None  # after an interrupt, all are written again
        for i, number in enumerate(here):
            if known is None or number != known[i]:
                self.where[i].fill_(number)
        self._known = here

    def release(self) -> None:
        self._table, self._coefficients = None, torch.empty(0)
        super().release()
