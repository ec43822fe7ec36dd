"""Peers that run our model's weights as backends, though the engine has no such backend."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_bench.peers import diffusers_transformer
from dit_engine.backends import Denoiser
from dit_engine.backends.compile import CompileBackend
from dit_engine.backends.eager import placed
from dit_engine.model import DiT


class MaxAutotuneBackend(CompileBackend):
    """The reference model as torch.compile has it quickest: timed candidates and CUDA graphs. A
    result is overwritten by the next call."""

    def __init__(self, model: DiT, precision: str, device: torch.device) -> None:
        super().__init__(model, precision, device, mode="max-autotune")


class DiffusersBackend:
    """diffusers' transformer on our weights. Raises ImportError without diffusers."""

    def __init__(self, model: DiT, precision: str, device: torch.device) -> None:
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        self.theirs = diffusers_transformer(placed(model, self.dtype, device))

    def prepare(self, labels: Tensor, timesteps: Tensor) -> Denoiser:
        def denoise(x: Tensor, step: int) -> Tensor:
            t = timesteps[step].expand(len(x))  # (M,)
            y = labels[: len(x)]
            return self.theirs(x.to(self.dtype), timestep=t, class_labels=y).sample.to(x.dtype)

        return denoise
