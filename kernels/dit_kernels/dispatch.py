"""Which implementation of an operator runs: the choice is made here and nowhere else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

KERNELS = ("triton", "triton-tma", "native")
IMPLEMENTATIONS = ("auto", "reference", *KERNELS)

# What the native library holds; what Triton holds is one module an operator.
NATIVE = frozenset({
    "layernorm_modulate", "gate_residual_layernorm_modulate", "gate_residual", "attention",
    "groupnorm_silu", "guided_step", "layernorm_modulate_quantize", "quantize_rows", "gelu",
})  # fmt: skip
TRITON = NATIVE
# Second Triton kernels of an operator, never chosen by "auto": (name, operator) → module.
# "triton-tma" fetches keys and values by tensor descriptors; no measurement has it ahead so far.
VARIANTS = {("triton-tma", "attention"): "attention_tma"}
OLDEST_WITH_TMA = (9, 0)
# Operators whose kernel lost to torch at the shapes that matter run the reference under "auto".
# (A measured loss belongs here, with the measurement.)
SLOWER: dict[str, frozenset[str]] = {"triton": frozenset(), "native": frozenset()}


class Unavailable(RuntimeError):
    """An implementation was asked for by name that cannot run here; the message says why."""


def why_not(implementation: str, operator: str, device: torch.device) -> str | None:
    """Why ``implementation`` of ``operator`` cannot run on ``device``, or None if it can."""
    if implementation == "reference":
        return None
    if not _exists(implementation, operator):
        return f"{operator} has no {implementation} implementation"
    if implementation == "native":
        from dit_kernels.cpu import operators as native

        if device.type != "cpu":
            return f"native kernels are for the CPU, not for {device}"
        return native.why_not()
    from dit_kernels import triton

    if (reason := triton.why_not(device)) is not None or implementation == "triton":
        return reason
    # Triton's interpreter, the only way on other devices, plays descriptors too.
    if (
        device.type == "cuda"
        and (has := torch.cuda.get_device_capability(device)) < OLDEST_WITH_TMA
    ):
        return f"compute capability {has[0]}.{has[1]}: 9.0 is the oldest with TMA"
    return None


def _exists(implementation: str, operator: str) -> bool:
    if implementation in ("native", "triton"):
        return operator in (NATIVE if implementation == "native" else TRITON)
    return (implementation, operator) in VARIANTS


def implementation(operator: str, impl: str, device: torch.device) -> Callable[..., Any]:
    """The function that computes ``operator`` on ``device``.

    Raises:
        ValueError: an unknown ``impl``.
        Unavailable: a named ``impl`` that cannot run here.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl {impl!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "auto":
        fused = "native" if device.type == "cpu" else "triton"
        usable = operator not in SLOWER[fused] and why_not(fused, operator, device) is None
        impl = fused if usable else "reference"
    elif (reason := why_not(impl, operator, device)) is not None:
        raise Unavailable(f"impl {impl!r}: {reason}")
    if impl.startswith("triton"):
        name = VARIANTS.get((impl, operator), operator)
        return getattr(import_module(f"dit_kernels.triton.{name}"), name)
    if impl == "native":
        return getattr(import_module("dit_kernels.cpu.operators"), operator)
    return getattr(import_module(f"dit_kernels.{impl}"), operator)


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd is to follow what is computed of these, which no kernel lets it."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def without_autocast(run: Callable[..., T]) -> Callable[..., T]:
    """``run`` with the dtypes that it was written with, also inside torch.autocast."""

    @functools.wraps(run)
    def exact(*arguments: Any, **options: Any) -> T:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return run(*arguments, **options)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return run(*arguments, **options)

    return exact


def available() -> dict[str, str]:
    """implementation → "yes …" or why not, for this machine."""
    from dit_kernels import triton
    from dit_kernels.cpu import operators as native

    cuda = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu_reason = triton.why_not(cuda)
    return {
        "reference": "yes",
        "native": native.why_not() or f"yes ({native.isa()})",
        "triton": gpu_reason or f"yes ({cuda})",
    }


def launcher(operator: str, device: torch.device) -> Callable[..., Any]:
    """The "auto" implementation, called without validation, that takes ``out=`` for its results.

    For inner loops whose shapes are known to be right and whose buffers are used again.
    """
    run = implementation(operator, "auto", device)
    if not run.__module__.endswith("reference"):
        return run

    def write(*arguments: Any, out: Any = None) -> Any:
        results = run(*arguments)
        if out is None:
            return results
        if isinstance(out, torch.Tensor):
            return out.copy_(results)
        for into, result in zip(out, results, strict=True):
            into.copy_(result)
        return out

    return write
