"""Which implementation of an operator runs: the choice is made here and nowhere else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import Tensor

from dit_kernels import reference, triton
from dit_kernels.checks import Unavailable
from dit_kernels.cpu import operators as native

T = TypeVar("T")
Run = Callable[..., Any]

KERNELS = ("triton", "triton-tma", "native")
IMPLEMENTATIONS = ("auto", "reference", *KERNELS)

OLDEST_WITH_TMA = (9, 0)
# Operators whose kernel lost to torch at the shapes that matter run the reference under "auto".
# (A measured loss belongs here, with the measurement.)
SLOWER: dict[str, frozenset[str]] = {"triton": frozenset(), "native": frozenset()}


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd follows what is computed from these, for which no kernel has a backward."""
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


NATIVE: dict[str, Run] = {run.__name__: run for run in (
    native.attention, native.gate_residual, native.gate_residual_layernorm_modulate, native.gelu,
    native.groupnorm_silu, native.guided_step, native.layernorm_modulate,
    native.layernorm_modulate_quantize, native.quantize_rows,
)}  # fmt: skip
REFERENCE: dict[str, Run] = {run.__name__: without_autocast(run) for run in (
    reference.attention, reference.gate_residual, reference.gate_residual_layernorm_modulate,
    reference.gelu, reference.groupnorm_silu, reference.guided_step, reference.layernorm_modulate,
    reference.layernorm_modulate_quantize, reference.quantize_rows,
)}  # fmt: skip


@functools.cache
def _triton() -> dict[str, Run]:
    """The same operators in Triton, whose modules need the package triton."""
    from dit_kernels.triton.attention import attention
    from dit_kernels.triton.gate_residual import gate_residual
    from dit_kernels.triton.gate_residual_layernorm_modulate import gate_residual_layernorm_modulate
    from dit_kernels.triton.gelu import gelu
    from dit_kernels.triton.groupnorm_silu import groupnorm_silu
    from dit_kernels.triton.guided_step import guided_step
    from dit_kernels.triton.layernorm_modulate import layernorm_modulate
    from dit_kernels.triton.layernorm_modulate_quantize import layernorm_modulate_quantize
    from dit_kernels.triton.quantize_rows import quantize_rows

    return {run.__name__: run for run in (
        attention, gate_residual, gate_residual_layernorm_modulate, gelu, groupnorm_silu,
        guided_step, layernorm_modulate, layernorm_modulate_quantize, quantize_rows,
    )}  # fmt: skip


@functools.cache
def _triton_tma() -> dict[str, Run]:
    """Attention with keys and values fetched by tensor descriptors.

    "auto" never takes it, because no measurement has it ahead.
    """
    from dit_kernels.triton.attention_tma import attention_tma

    return {"attention": attention_tma}


# Implementation → (operators that it has, a function that gives their functions).
TABLES: dict[str, tuple[Collection[str], Callable[[], dict[str, Run]]]] = {
    "reference": (REFERENCE, lambda: REFERENCE),
    "native": (NATIVE, lambda: NATIVE),
    "triton": (NATIVE, _triton),
    "triton-tma": (("attention",), _triton_tma),
}


def why_not(implementation: str, operator: str, device: torch.device) -> str | None:
    """Why ``implementation`` of ``operator`` cannot run on ``device``, or None if it can."""
    if implementation == "reference":
        return None
    if operator not in TABLES[implementation][0]:
        return f"{operator} has no {implementation} implementation"
    if implementation == "native":
        if device.type != "cpu":
            return f"native kernels are for the CPU, not for {device}"
        return native.why_not()
    if (reason := triton.why_not(device)) is not None or implementation == "triton":
        return reason
    # On other devices only Triton's interpreter gets here, and it has descriptors.
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_WITH_TMA:
            return f"compute capability {capability[0]}.{capability[1]}: 9.0 is the oldest with TMA"
    return None


def chosen(operator: str, impl: str, device: torch.device) -> str:
    """The implementation of ``operator`` that runs on ``device``: "reference" or one of KERNELS.

    Raises:
        ValueError: an unknown ``impl``.
        Unavailable: a named ``impl`` that cannot run here.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl {impl!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "auto":
        fused = "native" if device.type == "cpu" else "triton"
        usable = operator not in SLOWER[fused] and why_not(fused, operator, device) is None
        return fused if usable else "reference"
    if (reason := why_not(impl, operator, device)) is not None:
        raise Unavailable(f"impl {impl!r}: {reason}")
    return impl


def implementation(operator: str, impl: str, device: torch.device) -> Run:
    """The function that `chosen` names; the references compute in their own dtypes in autocast."""
    return TABLES[chosen(operator, impl, device)][1]()[operator]


def launcher(operator: str, device: torch.device) -> Run:
    """The "auto" implementation, called without validation, that takes ``out=`` for its results.

    For inner loops whose shapes are known to be right and whose buffers are used again.
    """
    run = implementation(operator, "auto", device)
    if chosen(operator, "auto", device) != "reference":
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


def available() -> dict[str, str]:
    """implementation → "yes …" or why not, for this machine."""
    cuda = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "reference": "yes",
        "native": native.why_not() or f"yes ({native.isa()})",
        "triton": triton.why_not(cuda) or f"yes ({cuda})",
    }
