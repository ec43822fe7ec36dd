"""The reference model as it stands: what every other backend is compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from dit_engine.backends import Denoiser
from dit_engine.model import DiT


class EagerBackend:
    """On the CPU in float32 images go through one by one, so that their bits do not depend on the
    batch: a matrix product's order of summation may change with its number of rows.
    """

    def __init__(self, model: DiT, dtype: torch.dtype) -> None:
        self.dtype = dtype
        parameter = next(model.parameters())
        self.model = model if parameter.dtype == dtype else copy.deepcopy(model).to(dtype)
        self.forward: Callable[[Tensor, Tensor, Tensor], Tensor] = self.model
        self.one_by_one = parameter.device.type == "cpu" and dtype == torch.float32

    def prepare(self, labels: Tensor, timesteps: Tensor) -> Denoiser:
        # A plain (x, t, y) function cannot hoist anything: it remembers its conditions.
        def denoise(x: Tensor, step: int) -> Tensor:
            t = timesteps[step].expand(len(x))  # (M,)
            y = labels[: len(x)]  # (M,)
            if self.one_by_one:
                rows = zip(x.split(1), t.split(1), y.split(1), strict=True)
                return torch.cat([self.forward(*row) for row in rows])
            return self.forward(x.to(self.dtype), t, y).to(x.dtype)

        return denoise
