"""The transformer as two graphs: the conditioner runs before the sampling loop, the denoiser in it.
The backends for onnxruntime and TensorRT differ only in how they run a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_engine.backends import Denoiser
from dit_engine.backends.lean.conditioning import ModulationTable
from dit_engine.config import ModelConfig
from dit_export.onnx.graphs import modulation_width

GRAPHS = ("conditioner", "denoiser")


@dataclass
class GraphPair:
    """The two graphs as functions. It is the `Conditions` of a `ModulationTable`.

    Args:
        conditioner: time steps (M,) and labels (M,), int64, → modulations (M, width).
        denoiser: latents (M, C, S, S) and modulations (M, width) → (M, C_out, S, S). Everything is
            contiguous float32 on ``device``.
    """

    config: ModelConfig
    device: torch.device
    conditioner: Callable[[Tensor, Tensor], Tensor]
    denoiser: Callable[[Tensor, Tensor], Tensor]
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.width = modulation_width(self.config)

    def embed(self, timesteps: Tensor) -> Tensor:
        """The time steps unchanged: the conditioner embeds them."""
        return timesteps

    def rows(self, t: Tensor, labels: Tensor, by_label: bool) -> Tensor:
        """Modulations (K, L, width) of time steps t (K,) × labels (L,)."""
        del by_label
        k, n = len(t), len(labels)
        rows = self.conditioner(t.long().repeat_interleave(n), labels.long().repeat(k))
        return rows.view(k, n, self.width)

    def prepare(self, labels: Tensor, timesteps: Tensor) -> Denoiser:
        labels, timesteps = labels.to(self.device), timesteps.to(self.device)
        table = ModulationTable(self, labels, timesteps, by_label=False)

        def denoise(x: Tensor, step: int) -> Tensor:
            if len(x) == 0:  # no graph takes an empty batch
                return x.new_empty(0, self.config.out_channels, *x.shape[2:])
            modulations = table.step(step, len(x))
            return self.denoiser(x.float().contiguous(), modulations).to(x.dtype)

        return denoise
