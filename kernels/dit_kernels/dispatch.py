"""Which implementation of an operator runs: the choice is made here and nowhere else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import torch

from dit_kernels import attention_libraries, reference, triton
from dit_kernels.checks import Unavailable
from dit_kernels.cpu import operators as native

T = TypeVar("T")
Run = Callable[..., Any]

FOR_ATTENTION = ("triton-tma", *attention_libraries.NAMES)
KERNELS = ("triton", "native", *FOR_ATTENTION)
IMPLEMENTATIONS = ("auto", "reference", *KERNELS)
OLDEST_WITH_TMA = (9, 0)

NATIVE: dict[str, Run] = {run.__name__: run for run in (
    native.attention, native.embed, native.gate_residual, native.gate_residual_layernorm_modulate,
    native.gelu, native.groupnorm_silu, native.guided_step, native.layernorm_modulate,
    native.gate_residual_layernorm_modulate_quantize, native.layernorm_modulate_quantize,
    native.quantize_rows,
)}  # fmt: skip


def wants_gradient(*tensors: torch.Tensor) -> bool:
    """Whether autograd records what is computed from these; no kernel has a backward pass."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def without_autocast(run: Callable[..., T]) -> Callable[..., T]:
    """``run``, which then keeps its own dtypes inside torch.autocast too."""

    @functools.wraps(run)
    def exact(*arguments: Any, **options: Any) -> T:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return run(*arguments, **options)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return run(*arguments, **options)

    return exact


def why_not(implementation: str, operator: str, device: torch.device) -> str | None:
    """Why ``implementation`` of ``operator`` cannot run on ``device``, or None if it can."""
    if implementation == "reference":
        return None
    if implementation == "native":
        if device.type != "cpu":
            return f"native kernels are for the CPU, not for {device}"
        if operator not in NATIVE:
            return f"{operator} has no native implementation"
        return native.why_not()
    if implementation in FOR_ATTENTION and operator != "attention":
        return f"{operator} has no {implementation} implementation"
    if implementation in attention_libraries.NAMES:
        return attention_libraries.why_not(implementation, device)
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

    "auto" never means one of `FOR_ATTENTION`; the lean forward measures those
    (`dit_engine.backends.lean.choices`).

    Raises:
        ValueError: an unknown ``impl``.
        Unavailable: a named ``impl`` that cannot run here.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl {impl!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "auto":
        fused = "native" if device.type == "cpu" else "triton"
        return fused if why_not(fused, operator, device) is None else "reference"
    if (reason := why_not(impl, operator, device)) is not None:
        raise Unavailable(f"impl {impl!r}: {reason}")
    return impl


def implementation(operator: str, impl: str, device: torch.device) -> Run:
    """The function that `chosen` names; a reference keeps its own dtypes inside autocast."""
    kind = chosen(operator, impl, device)
    return NATIVE[operator] if kind == "native" else _imported(operator, kind)


@functools.cache
def _imported(operator: str, kind: str) -> Run:
    """A reference, a library's attention, or the function of the operator's module in
    dit_kernels/triton/, whose import needs the package triton."""
    if kind == "reference":
        return without_autocast(getattr(reference, operator))
    if kind in attention_libraries.NAMES:
        return without_autocast(attention_libraries.launcher(kind))
    name = "attention_tma" if kind == "triton-tma" else operator
    return getattr(import_module(f"dit_kernels.triton.{name}"), name)


def launcher(operator: str, device: torch.device) -> Run:
    """The "auto" implementation, called without validation, that takes ``out=`` for its results.

    For inner loops whose shapes are known to be right and whose buffers are used again.
    """
    run = implementation(operator, "auto", device)
    if chosen(operator, "auto", device) != "reference":
        return run

    def write(*arguments: Any, out: Any = None, **options: Any) -> Any:
        results = run(*arguments, **options)
        if out is None:
            return results
        if isinstance(out, torch.Tensor):
            return out.copy_(results)
        for into, result in zip(out, results, strict=True):
            into.copy_(result)
        return out

    return write


def attention_candidates(
    n: int, tokens: int, heads: int, d: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Run]:
    """Candidates for attention in half precision on qkv (N, T, 3·H·d): name → function (qkv, heads,
    out=). The first is the one that "auto" uses on a GPU.

    Raises Unavailable if Triton's kernels cannot run on ``device``.
    """
    chosen("attention", "triton", device)
    tiles = import_module("dit_kernels.triton.attention").candidates(
        n, tokens, heads, d, dtype, device
    )
    found: dict[str, Run] = {}
    for prefix, kind in (("", "triton"), ("tma ", "triton-tma")):
        if why_not(kind, "attention", device) is None:
            run = _imported("attention", kind)
            found |= {f"{prefix}{t}": functools.partial(run, tiles=t) for t in tiles[kind]}
    for name in attention_libraries.NAMES:
        if why_not(name, "attention", device) is None:
            found[name] = _imported("attention", name)
    return found


def available() -> dict[str, str]:
    """For this machine: each implementation → "yes …" or the reason why it cannot run."""
    cuda = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "reference": "yes",
        "native": native.why_not() or f"yes ({native.isa()})",
        "triton": triton.why_not(cuda) or f"yes ({cuda})",
    }
