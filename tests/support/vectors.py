"""The test vectors: what the original code (facebookresearch/DiT) computed in float64."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dit_engine.config import ModelConfig
from dit_engine.model import DiT

DATA = Path(__file__).parents[1] / "data"


@dataclass(frozen=True)
class Vectors:
    """One file of tests/data."""

    config: ModelConfig
    steps: int
    guidance_scale: float
    tensors: dict[str, Tensor]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def model(self, dtype: torch.dtype = torch.float64) -> DiT:
        model = DiT(self.config)
        prefix = "state_dict."
        model.load_state_dict(
            {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}
        )
        return model.to(dtype).eval().requires_grad_(False)

    @property
    def null(self) -> Tensor:
        """(N,) null labels."""
        return torch.full_like(self["forward.y"], self.config.null_class)


def read_vectors(name: str) -> Vectors:
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return Vectors(
        ModelConfig.from_dict(json.loads(metadata["config"])),
        int(metadata["steps"]),
        float(metadata["cfg_scale"]),
        tensors,
    )
