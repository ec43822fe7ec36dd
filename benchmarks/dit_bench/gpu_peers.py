"""Peers that run our model's weights as backends, though the engine has no such backend."""

from __future__ import annotations

from types import FunctionType

import torch
from torch import Tensor

from dit_bench.peers import diffusers_transformer
from dit_engine.backends import Denoiser
from dit_engine.backends.eager import EagerBackend, placed
from dit_engine.model import DiT


class MaxAutotuneBackend(EagerBackend):
    """The reference model as torch.compile has it quickest: timed candidates, CUDA graphs, one
    graph a batch size. A result is overwritten by the next call."""

    def __init__(self, model: DiT, precision: str, device: torch.device) -> None:
        super().__init__(model, precision, device)
        self.one_by_one = False
        module = self.model

        def forward(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return module(x, t, y)

        # torch counts compilations a code object, and gives up after eight of them.
        own = FunctionType(
            forward.__code__.replace(), globals(), closure=forward.__closure__, name="forward"
        )
        self.forward = torch.compile(own, fullgraph=True, dynamic=False, mode="max-autotune")


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
