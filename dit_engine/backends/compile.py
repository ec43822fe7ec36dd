"""The reference model under torch.compile (Inductor)."""

from __future__ import annotations

import shutil
from types import FunctionType

import torch
from torch import Tensor

from dit_engine.backends.eager import EagerBackend
from dit_engine.errors import BackendUnavailable
from dit_engine.model import DiT


class CompileBackend(EagerBackend):
    """The first batch size gets a graph of its own, the second one that serves all others.

    ``fullgraph`` makes whatever torch.compile cannot do an error, where it would otherwise run
    eagerly without a word.
    """

    def __init__(self, model: DiT, precision: str, device: torch.device) -> None:
        super().__init__(model, precision, device)
        if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise BackendUnavailable(
                "backend 'compile' needs a C++ compiler (g++ or clang++) on the CPU"
            )
        self.one_by_one = False
        module = self.model

        def forward(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return module(x, t, y)

        # torch counts compilations a code object, and gives up after eight of them. A code object
        # of its own keeps this backend from being charged for those of other engines.
        own = FunctionType(
            forward.__code__.replace(), globals(), closure=forward.__closure__, name="forward"
        )
        self.forward = torch.compile(own, fullgraph=True)
