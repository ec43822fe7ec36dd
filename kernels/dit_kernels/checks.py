"""Checks of the operators' arguments. Every refusal is a ValueError of one line.

The public operators check before they choose an implementation. The native ones check again,
because the lean forward calls them directly and C++ gets bare addresses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIM_LIMIT = 128
FLOAT = (torch.float32,)


class Unavailable(RuntimeError):
    """An implementation that was asked for by name cannot run here; the message says why."""


def check(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype] = DTYPES,
    device: torch.device | None = None,
    layout: torch.memory_format | None = torch.contiguous_format,
) -> None:
    """Raise ValueError unless the tensor has this shape, one of these dtypes, this device and this
    layout in memory.

    In ``shape``, a letter stands for any size above 0, but "N" also for 0. device None allows every
    device, layout None every layout.
    """
    fits = tensor.shape == tuple(shape) or (
        len(tensor.shape) == len(shape)
        and all(
            size == needed or needed == "N" or (isinstance(needed, str) and size > 0)
            for size, needed in zip(tensor.shape, shape, strict=True)
        )
    )
    if not fits or tensor.dtype not in dtypes or device not in (None, tensor.device):
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes))
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; {allowed} "
            f"({', '.join(map(str, shape))}){f' on {device}' if device else ''} is needed"
        )
    if layout is not None and not tensor.is_contiguous(memory_format=layout):
        kind = "" if layout == torch.contiguous_format else " in torch.channels_last memory"
        raise ValueError(f"{name} of strides {tensor.stride()} is not contiguous{kind}")


def check_tokens(
    x: Tensor, y: Tensor | None = None, eps: float = 1.0, **modulation: Tensor
) -> tuple[int, int, int]:
    """Check x and y, (N, T, D), and each modulation, (N, D) in x's dtype or float32, with rows at
    any stride. Returns (N, T, D)."""
    check("x", x, ("N", "T", "D"))
    if y is not None:
        check("y", y, x.shape, (x.dtype,), x.device)
    n, t, d = x.shape
    for name, tensor in modulation.items():
        check(name, tensor, (n, d), (x.dtype, torch.float32), x.device, layout=None)
        if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension, not 1")
    check_eps(eps)
    return n, t, d


def check_eps(eps: float) -> None:
    if not eps > 0:
        raise ValueError(f"eps {eps} is not above 0")


def check_rows(x: Tensor) -> None:
    """Check that x is (…, D) with D above 0."""
    check("x", x, (*x.shape[:-1], "D"))


def check_qkv(qkv: Tensor, num_heads: int) -> tuple[int, int, int]:
    """Check qkv (N, T, 3·H·d), d a multiple of 8 up to 128. Returns (N, T, d)."""
    check("qkv", qkv, ("N", "T", "3·H·d"))
    n, t, width = qkv.shape
    if not isinstance(num_heads, int) or num_heads < 1 or width % (3 * num_heads):
        raise ValueError(
            f"num_heads {num_heads!r} is no integer that divides a third of qkv's width {width}"
        )
    d = width // 3 // num_heads
    if d % 8 or d > HEAD_DIM_LIMIT:
        raise ValueError(f"head dimension {d}: multiples of 8 up to {HEAD_DIM_LIMIT} are supported")
    return n, t, d


def check_linear(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Check x (…, K), weight (M, K) and bias (M,): one dtype, one device, K above 0."""
    check("x", x, (*x.shape[:-1], "K"), layout=None)
    check("weight", weight, ("N", x.shape[-1]), (x.dtype,), x.device, layout=None)
    check("bias", bias, weight.shape[:1], (x.dtype,), x.device, layout=None)


def check_images(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Check x, (N, C, H, W) in channels-last memory, and weight and bias, (C,)."""
    check("x", x, ("N", "C", "H", "W"), layout=torch.channels_last)
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups {groups} does not divide the {channels} channels")
    for name, tensor in (("weight", weight), ("bias", bias)):
        check(name, tensor, (channels,), (x.dtype, torch.float32), x.device)
    check_eps(eps)


def check_latents(z: Tensor, patch_size: int) -> tuple[int, int, int]:
    """Check float32 latents z (N, C, S, S), whose side the patches divide. Returns (N, C, S)."""
    check("z", z, ("N", "C", *z.shape[-1:], "S"), FLOAT)
    if patch_size < 1 or z.shape[2] % patch_size:
        raise ValueError(f"patch_size {patch_size} does not divide the latent side {z.shape[2]}")
    return z.shape[0], z.shape[1], z.shape[2]


def check_guided_step(
    tokens: Tensor, z: Tensor, x0_before: Tensor, noise: Tensor, guidance_scale: Tensor,
    coefficients: Tensor, guided_channels: int, patch_size: int,
) -> None:  # fmt: skip
    """Check the arguments of `guided_step`; the latents must be float32 and contiguous."""
    n, c, s = check_latents(z, patch_size)
    check("x0_before", x0_before, z.shape, FLOAT, z.device)
    check("noise", noise, z.shape, FLOAT, z.device)
    check("guidance_scale", guidance_scale, (n,), FLOAT, z.device)
    check("coefficients", coefficients, (9,), FLOAT, z.device)
    check("tokens", tokens, ("N", "T", "D"), device=z.device)
    count, patch = (s // patch_size) ** 2, c * patch_size**2
    rows, t, width = tokens.shape
    if rows not in (n, 2 * n) or t != count or width not in (patch, 2 * patch):
        raise ValueError(
            f"tokens has shape {(rows, t, width)}; latents {tuple(z.shape)} in patches of "
            f"{patch_size} need ({n} or {2 * n}, {count}, {patch} or {2 * patch})"
        )
    if not 1 <= guided_channels <= c:
        raise ValueError(f"guided_channels {guided_channels} is out of range: allowed is 1 to {c}")


def check_codes(
    dtype: torch.dtype, allowed: Sequence[torch.dtype] = (torch.int8, torch.float8_e4m3fn)
) -> None:
    """Check that codes may have this dtype."""
    if dtype not in allowed:
        raise ValueError(f"dtype {dtype}: choose {' or '.join(map(str, allowed))}")
