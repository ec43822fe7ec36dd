"""Backends: ways to run the denoiser. Each is one file, imported when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from dit_engine.model import DiT

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "fp8")

# name → (module, factory); the order is that of messages and help texts.
_FACTORIES = {
    "eager": ("dit_engine.backends.eager", "EagerBackend"),
    "compile": ("dit_engine.backends.compile", "CompileBackend"),
    "lean": ("dit_engine.backends.lean", "LeanBackend"),
}
BACKENDS = ("auto", *_FACTORIES)


class Denoiser(Protocol):
    """The model with its conditions fixed."""

    def __call__(self, x: Tensor, step: int) -> Tensor:
        """Latents x (M, C, S, S) at the ``step``-th time step → (M, C_out, S, S), x's dtype.

        M may be less than the number of labels prepared; the first M labels are then used.
        """
        ...


class Backend(Protocol):
    def prepare(self, labels: Tensor, timesteps: Tensor) -> Denoiser:
        """Fix the conditions: labels (N,) and the time steps (K,) in the order they are taken.

        Whatever depends on these alone should be computed here, once.
        """
        ...


Factory = Callable[[DiT, str, torch.device], Backend]


def resolve_backend(name: str) -> str:
    """The backend that ``name`` stands for; "auto" is the quickest exact one.

    Raises ValueError, which lists the known ones.
    """
    if name == "auto":
        return "lean"
    if name not in _FACTORIES:
        raise ValueError(f"backend {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    return name


def create_backend(name: str, model: DiT, precision: str, device: torch.device) -> Backend:
    """Build the backend ``name`` for ``model``, which stays as and where it is.

    Raises ValueError for an unknown name or precision and `BackendUnavailable` where the backend
    cannot run on this machine: a backend asked for by name never gives way to another.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
    module, factory_name = _FACTORIES[resolve_backend(name)]
    factory: Factory = getattr(import_module(module), factory_name)
    return factory(model, precision, device)
