"""The reference model under torch.compile (Inductor), one graph a batch size."""

from __future__ import annotations

import shutil

import torch

from dit_engine.backends.eager import EagerBackend
from dit_engine.errors import BackendUnavailable
from dit_engine.model import DiT


class CompileBackend(EagerBackend):
    def __init__(self, model: DiT, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        on_cpu = next(model.parameters()).device.type == "cpu"
        if on_cpu and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise BackendUnavailable(
                "backend 'compile' needs a C++ compiler (g++ or clang++) on the CPU"
            )
        self.one_by_one = False
        self.forward = torch.compile(self.model, dynamic=False)
