"""Backends: ways to run the denoiser. Each is one file, imported when it is first asked for.

Other packages add theirs as entry points of the group "dit_engine.backends", each a `Factory`. A
name may carry an address, as in "triton://host:port", which is given to its factory.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # the commands' --help lists the backends, and does without torch
    import numpy as np
    import torch
    from torch import Tensor

    from dit_engine.model import DiT
    from dit_engine.vae import AutoencoderKL

from dit_engine.arguments import choice, shown

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "fp8")

# name → (module, factory); the order is that of messages and help texts.
_FACTORIES = {
    "eager": ("dit_engine.backends.eager", "EagerBackend"),
    "compile": ("dit_engine.backends.compile", "CompileBackend"),
    "lean": ("dit_engine.backends.lean.backend", "LeanBackend"),
}
ENTRY_POINTS = "dit_engine.backends"
# Other names → the names above.
ALIASES = {"auto": "lean", "trt": "tensorrt"}


class Denoiser(Protocol):
    """The model with its labels and time steps fixed."""

    def __call__(self, x: Tensor, step: int, /) -> Tensor:
        """Latents x (M, C, S, S) at the ``step``-th time step → (M, C_out, S, S) in x's dtype.

        M may be less than the number of labels prepared; the first M labels are then used.
        """
        ...


class FusedDenoiser(Protocol):
    """Like `Denoiser`, but each call also applies guidance and the sampler's update. `release` is
    optional: a class that derives from this one inherits a version that does nothing."""

    def guided_step(
        self, z: Tensor, x0_before: Tensor, noise: Tensor | None, step: int, guide: bool
    ) -> tuple[Tensor, Tensor]:
        """Latents z (N, C, S, S) at the ``step``-th time step → (the next z, the predicted x0).

        Both results may be in memory of the denoiser, which the next call overwrites: copy what is
        to be kept. It is fastest to pass both to the next call as they are. Arguments are not
        changed, except results of an earlier call.

        Args:
            x0_before: (N, C, S, S), the predicted x0 of the step before.
            noise: (N, C, S, S), the noise that the step adds; None if it adds none.
            guide: whether to compute the unconditional half, whose labels are the last N prepared.
        """
        ...

    def release(self) -> None:
        """Release what steps hold, such as a CUDA graph. Called when the results are no longer
        needed. Further steps are allowed."""


Decode = Callable[["Tensor"], "Tensor"]
"""The VAE's own latents (N, c, h, w) → images (N, 3, H, W), about [-1, 1]."""


class Backend(Protocol):
    """A way to run the model. A class that derives from this one inherits what is optional."""

    def prepare(self, labels: Tensor, timesteps: Tensor) -> Denoiser:
        """Fix the labels (N,) and the time steps (K,), in the order in which they are taken.

        Whatever depends on these alone should be computed here, once.
        """
        ...

    def fuse(
        self,
        labels: Tensor,
        timesteps: Tensor,
        coefficients: np.ndarray,
        scales: Tensor,
        guided_channels: int,
    ) -> FusedDenoiser | None:
        """As `prepare`, for whole sampler steps; None if the backend takes none (the default).

        Args:
            coefficients: (K, 9) of `dit_engine.sampling.coefficients.step_coefficients`.
            scales: (N,) guidance scales of the images.
            guided_channels: how many latent channels are guided.
        """
        return None

    @staticmethod
    def decoder(vae: AutoencoderKL, dtype: torch.dtype, device: torch.device) -> Decode | None:
        """A quicker decoder that does not change ``vae``; None (the default) means that the VAE's
        own decoder is used."""
        return None


Factory = Callable[..., Backend]
"""(model, precision, device) → Backend, with ``address=`` where the name carried one."""


def known_backends() -> tuple[str, ...]:
    """Every name that `create_backend` takes, "auto" first."""
    added = sorted({point.name for point in entry_points(group=ENTRY_POINTS)})
    return ("auto", *_FACTORIES, *added)


def resolve_backend(name: str) -> str:
    """The backend that ``name`` stands for; "auto" is the quickest exact one.

    Raises ValueError, which lists the known ones.
    """
    kind, scheme, address = name.partition("://") if isinstance(name, str) else ("", "", "")
    kind = ALIASES.get(kind, kind)
    if kind not in _FACTORIES and _added(kind) is None:
        known = known_backends()
        begin = [other for other in known if kind and other.startswith(kind.lower())]
        near = begin or get_close_matches(kind.lower(), known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"backend {shown(name)} is unknown; {hint}choose one of {', '.join(known)}"
        )
    return kind + scheme + address


def _added(name: str) -> EntryPoint | None:
    return next(iter(entry_points(group=ENTRY_POINTS, name=name)), None)


def create_backend(name: str, model: DiT, precision: str, device: torch.device) -> Backend:
    """Build the backend ``name`` for ``model``, which stays as and where it is.

    Raises ValueError for an unknown name or precision and `BackendUnavailable` where the backend
    cannot run on this machine: a backend asked for by name never gives way to another.
    """
    from dit_engine.errors import BackendUnavailable
    from dit_engine.runtime import bfloat16_why_not, with_index

    device = with_index(device)
    choice("precision", precision, PRECISIONS)
    kind, scheme, address = resolve_backend(name).partition("://")
    options = {"address": address} if scheme else {}
    # Ours first: no other package takes over a name of ours.
    if kind in _FACTORIES:
        if scheme:
            raise ValueError(f"backend {name!r}: {kind} takes no address")
        if precision == "bf16" and (reason := bfloat16_why_not(device)) is not None:
            raise BackendUnavailable(f"precision 'bf16': {reason}; fp16 and fp32 work there")
        module, factory_name = _FACTORIES[kind]
        return getattr(import_module(module), factory_name)(model, precision, device)
    added = _added(kind)
    assert added is not None
    made: Any = added.load()(model, precision, device, **options)
    if hasattr(made, "fuse") and hasattr(made, "decoder"):
        return made
    # It has only ``prepare``, and may be frozen or shared, so nothing is added to it.
    prepared: Any = SimpleNamespace(
        prepare=made.prepare, fuse=lambda *_: None, decoder=Backend.decoder
    )
    return prepared
