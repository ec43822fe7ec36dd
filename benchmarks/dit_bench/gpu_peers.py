"""Peers that run our model's weights as backends, though the engine has no such backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dit_bench.peers import diffusers_transformer
from dit_engine.backends import Backend, Denoiser
from dit_engine.backends.compile import CompileBackend, compile_static
from dit_engine.backends.eager import EagerBackend, placed
from dit_engine.model import DiT


class CompiledBlocksBackend(EagerBackend):
    """The reference model with its repeated block under torch.compile, as diffusers'
    ``compile_repeated_blocks`` has it: one compilation a batch size serves all blocks, where that
    of a whole XL/2 takes a minute. What lies around the blocks runs eagerly."""

    def __init__(self, model: DiT, precision: str, device: torch.device) -> None:
        super().__init__(model, precision, device)
        self.one_by_one = False
        # A twin, since the engine's own model must stay as it is.
        with torch.device("meta"):
            twin = DiT(self.model.config)
        twin.load_state_dict(self.model.state_dict(), assign=True)
        twin = twin.eval().requires_grad_(False)

        def run(block: nn.Module, x: Tensor, c: Tensor) -> Tensor:
            return block(x, c)

        compiled: dict[int, Callable[..., Tensor]] = {}

        def forward(block: nn.Module, x: Tensor, c: Tensor) -> Tensor:
            if len(x) not in compiled:
                compiled[len(x)] = compile_static(run)
            return compiled[len(x)](block, x, c)

        for own, block in zip(twin.blocks, self.model.blocks, strict=True):
            own.forward = partial(forward, block)
        self.forward = twin


class MaxAutotuneBackend(CompileBackend):
    """The reference model as torch.compile has it quickest: timed candidates and CUDA graphs. A
    result is overwritten by the next call."""

    def __init__(self, model: DiT, precision: str, device: torch.device) -> None:
        super().__init__(model, precision, device, mode="max-autotune")


class DiffusersBackend(Backend):
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
