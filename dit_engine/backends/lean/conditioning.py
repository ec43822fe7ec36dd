"""Everything that depends on (time step, label) alone, computed before the sampling loop.

A DiT block sees t and y only through its six modulation vectors (paper, section 3.2), which do not
depend on the latents. Hoisting them takes the adaLN weights, a third of DiT-XL's parameters, out of
the loop.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_engine.config import ModelConfig
from dit_engine.model import Block, DiT, FinalLayer

TABLE_BYTES = 256 * 2**20
"""A table holds as many steps as fit this many bytes, but at least `GRAIN` by label (else one); the
rest are computed when they are reached."""
GRAIN = 8
"""Steps in one product where each label is computed alone. A product's bits may depend on its
number of rows, so this number must not depend on the other labels of a batch."""


class Conditions(Protocol):
    """What computes a `ModulationTable`, such as `Conditioning`: ``width`` numbers of ``dtype`` for
    each time step and label."""

    config: ModelConfig
    dtype: torch.dtype
    width: int

    def embed(self, timesteps: Tensor) -> Tensor: ...

    def rows(self, t: Tensor, labels: Tensor, by_label: bool) -> Tensor: ...


class Conditioning:
    """Copies of a DiT's conditioning weights; those of adaLN are in ``dtype``, on ``device``.

    The embedders are in float32 whatever the model is stored in: they run once per table. Nothing
    here refers to the model, so that its file can be unmapped from memory.
    """

    def __init__(self, model: DiT, dtype: torch.dtype, device: torch.device) -> None:
        self.config = model.config
        self.dtype, self.device = dtype, device
        self.t_embedder = copy.deepcopy(model.t_embedder).float()
        self.y_embedder = copy.deepcopy(model.y_embedder).float()
        self.heads: list[tuple[Tensor, Tensor]] = []
        for layer in [*model.blocks, model.final_layer]:
            assert isinstance(layer, Block | FinalLayer)
            head = layer.adaLN_modulation[1]
            assert isinstance(head, nn.Linear)
            weight, bias = (p.to(device, dtype, copy=True) for p in (head.weight, head.bias))
            self.heads.append((weight, bias))
        self.width = sum(len(bias) for _, bias in self.heads)

    def embed(self, timesteps: Tensor) -> Tensor:
        """Time steps (K,) → their embeddings (K, D), where the embedders are."""
        return self.t_embedder(timesteps.to(self.y_embedder.embedding_table.weight.device))

    def rows(self, t: Tensor, labels: Tensor, by_label: bool) -> Tensor:
        """Modulations (K, L, width) of `embed`ded time steps t (K, D) × labels (L,).

        by_label: each product is for one label and `GRAIN` steps, so that a label's bits do not
            depend on the other labels.
        """
        y = self.y_embedder(labels.to(t.device))  # (L, D)
        c = F.silu(t[:, None] + y).to(self.device, self.dtype)  # (K, L, D)
        table = torch.empty(*c.shape[:2], self.width, dtype=self.dtype, device=self.device)
        parts: list[tuple[Any, Any]] = [(slice(None), slice(None))]
        if by_label:
            starts = range(0, len(t), GRAIN)
            parts = [(slice(k, k + GRAIN), n) for k in starts for n in range(len(labels))]
        at = 0
        for weight, bias in self.heads:
            for part in parts:
                table[part[0], part[1], at : at + len(bias)] = F.linear(c[part], weight, bias)
            at += len(bias)
        return table


class ModulationTable:
    """Modulations of every step for a batch's labels, a bounded number of steps at a time.

    Args:
        labels: (N,) class of each row; timesteps: (K,) in the order in which they are taken.
        by_label: see `Conditioning.rows`.
    """

    def __init__(
        self, conditioning: Conditions, labels: Tensor, timesteps: Tensor, by_label: bool
    ) -> None:
        self.conditioning, self.by_label = conditioning, by_label
        self._t: Tensor | None = None  # (K, D), of all steps at once, as rows of one product
        self.timesteps = timesteps
        self.labels, self.index = labels.unique(return_inverse=True)  # (L,), (N,)
        row = conditioning.width * torch.empty(0, dtype=conditioning.dtype).element_size()
        self.chunk = max(1, min(len(timesteps), TABLE_BYTES // (row * len(self.labels))))
        if by_label:  # products begin at the same steps whatever the chunk
            self.chunk = max(GRAIN, self.chunk - self.chunk % GRAIN)
        self._first = -1
        self._table = torch.empty(0)

    def steps_from(self, k: int) -> tuple[int, Tensor]:
        """The chunk that holds step k: (its first step, its modulations (steps, L, width)).

        Another chunk is computed, and the one before is freed, if k is not in the current chunk.
        """
        first = k - k % self.chunk
        if first != self._first:
            self._table = torch.empty(0)  # freed before the next chunk is made
            if self._t is None:
                self._t = self.conditioning.embed(self.timesteps)
            t = self._t[first : first + self.chunk]
            self._table = self.conditioning.rows(t, self.labels, self.by_label)
            self._first = first
        return first, self._table

    def step(self, k: int, rows: int, out: Tensor | None = None) -> Tensor:
        """Modulations (rows, width) of step k for the first ``rows`` labels."""
        first, table = self.steps_from(k)
        if out is not None and out.device.type == "cpu":
            # numpy copies with one thread; torch would wake others, and wait for them, at each
            # step. The views as int16 are for bfloat16, which numpy does not have.
            table, into = (v.view(torch.int16).numpy() for v in (table[k - first], out))
            np.take(table, self.index[:rows].numpy(), axis=0, out=into, mode="clip")
            return out
        return torch.index_select(table[k - first], 0, self.index[:rows], out=out)
