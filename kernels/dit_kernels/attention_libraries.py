"""Attention by torch's own kernels and by the package flash-attn. A caller names the kernel.

torch's kernels are called as aten operators, not through `torch.nn.attention.sdpa_kernel`: that
switches kernels for the whole process, so attention in other threads could fail.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dit_kernels.checks import Unavailable

OF_TORCH = ("cudnn", "flash")
FLASH_ATTN = (
    ("flash_attn.cute", "flash_attn_func"),  # FlashAttention 4: (q, k, v)
    ("flash_attn", "flash_attn_qkvpacked_func"),  # FlashAttention 2: packed
)
NAMES = (*OF_TORCH, "flash-attn")


def why_not(impl: str, device: torch.device) -> str | None:
    """Why ``impl``, one of `NAMES`, cannot run on ``device``; None if no reason is known. A kernel
    that passes may still refuse a shape or dtype when it is called."""
    if impl == "cudnn" and device.type != "cuda":
        return f"cuDNN is for CUDA devices, not for {device}"
    if impl != "flash-attn":
        return None
    try:
        _flash_attn(_newest_first(device))
    except ImportError as error:
        return str(error)
    return None


def launcher(impl: str) -> Callable[..., Tensor]:
    """The function (qkv (N, T, 3·H·d), heads, out=) → (N, T, H·d) for one of `NAMES`. With ``out``
    the result is copied once more.

    The function raises Unavailable if the library refuses the call.
    """

    def attention(qkv: Tensor, num_heads: int, *, out: Tensor | None = None) -> Tensor:
        n, t, width = qkv.shape
        if n == 0:
            return qkv.new_empty(n, t, width // 3) if out is None else out
        packed = qkv.view(n, t, 3, num_heads, width // 3 // num_heads)
        try:
            made = _by_torch(packed, impl) if impl in OF_TORCH else _by_flash_attn(packed)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, AssertionError, ValueError) as error:
            raise Unavailable(f"impl {impl!r}: {_line(error)}") from error
        made = made.reshape(n, t, width // 3)
        return made if out is None else out.copy_(made)

    return attention


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _by_torch(packed: Tensor, impl: str) -> Tensor:
    """Packed (N, T, 3, H, d) → (N, T, H, d)."""
    q, k, v = packed.permute(2, 0, 3, 1, 4)  # each (N, H, T, d)
    aten = torch.ops.aten
    if impl == "cudnn":
        made = aten._scaled_dot_product_cudnn_attention(q, k, v, None, compute_log_sumexp=False)
    elif packed.device.type == "cpu":
        made = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    else:
        made = aten._scaled_dot_product_flash_attention(q, k, v)
    return made[0].transpose(1, 2)


def _by_flash_attn(packed: Tensor) -> Tensor:
    run, takes_packed = _flash_attn(_newest_first(packed.device))
    made = run(packed) if takes_packed else run(*packed.unbind(2))
    return made[0] if isinstance(made, tuple) else made  # some versions add the log-sum-exp


def _newest_first(device: torch.device) -> bool:
    """Whether to try FlashAttention 4 first: it is made for Hopper and Blackwell."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _flash_attn(newest_first: bool) -> tuple[Callable[..., Any], bool]:
    """The function of the installed package, and whether it takes q, k and v packed.

    Raises ImportError if neither version can be imported; the message says what to install.
    """
    reasons = []
    for module, name in FLASH_ATTN if newest_first else reversed(FLASH_ATTN):
        try:
            return getattr(import_module(module), name), name.endswith("packed_func")
        except Exception as error:  # noqa: PERF203 - a build for another torch may raise anything
            reasons.append(_line(error))
    told = "; ".join(dict.fromkeys(reasons))
    raise ImportError(
        "the package flash-attn is needed, which is for CUDA: pip install flash-attn "
        f"(FlashAttention 2) or flash-attn-4 (FlashAttention 4, Hopper and later) ({told})"
    )
