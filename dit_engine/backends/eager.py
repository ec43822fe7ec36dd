"""The unchanged reference model, with which every other backend is compared."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dit_engine.backends import Backend, Denoiser
from dit_engine.errors import BackendUnavailable
from dit_engine.model import DiT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class EagerBackend(Backend):
    """On the CPU in float32, images are computed one by one, so that their bits do not depend on
    the batch: the order of summation in a matrix product may change with its number of rows.
    """

    def __init__(self, model: DiT, precision: str, device: torch.device) -> None:
        if precision not in DTYPES:
            raise BackendUnavailable(
                f"precision {precision!r} is for backend 'lean'; this one has {', '.join(DTYPES)}"
            )
        self.dtype = DTYPES[precision]
        self.model = placed(model, self.dtype, device)
        self.forward: Callable[..., Tensor] = self.model  # (x, t, y) → the model's output
        self.one_by_one = device.type == "cpu" and self.dtype == torch.float32

    def prepare(self, labels: Tensor, timesteps: Tensor) -> Denoiser:
        # A plain (x, t, y) function has no part that could be computed here, before the loop.
        def denoise(x: Tensor, step: int) -> Tensor:
            t = timesteps[step].expand(len(x))  # (M,)
            y = labels[: len(x)]  # (M,)
            if self.one_by_one:
                rows = zip(x.split(1), t.split(1), y.split(1), strict=True)
                return torch.cat([self.forward(*row) for row in rows])
            return self.forward(x.to(self.dtype), t, y).to(x.dtype)

        return denoise


def placed(model: DiT, dtype: torch.dtype, device: torch.device) -> DiT:
    """``model`` itself if it is on ``device`` in ``dtype``, else a copy that is.

    Weights are converted one by one, so that no second full-width copy is ever made.
    """
    state = model.state_dict()
    there = torch.empty(0, device=device).device  # "cuda" has an index once a tensor is there
    if all(v.dtype == dtype and v.device == there for v in state.values()):
        return model
    with torch.device("meta"):
        twin = DiT(model.config)
    converted = {name: value.to(device, dtype) for name, value in state.items()}
    twin.load_state_dict(converted, assign=True)
    return twin.eval().requires_grad_(False)
