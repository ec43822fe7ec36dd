"""What the operators ask of their arguments. Every refusal is a ValueError of one line.

The public operators check before they choose an implementation. The native ones check again,
because the lean forward calls them directly and C++ gets bare addresses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIM_LIMIT = 128


class Unavailable(RuntimeError):
    """An implementation that was asked for by name cannot run here; the message says why."""


def check_tokens(name: str, x: Tensor) -> tuple[int, int, int]:
    """(N, T, D), the shape of x, which is contiguous; T and D are above 0."""
    check_dtype(name, x)
    if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; (N, T, D) with T, D > 0 is needed")
    check_contiguous(name, x)
    return x.shape[0], x.shape[1], x.shape[2]


def check_rows(name: str, x: Tensor) -> tuple[int, int]:
    """(R, D) of x (…, D), which is contiguous: how many rows it has, and their width above 0."""
    check_dtype(name, x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; (…, D) with D > 0 is needed")
    check_contiguous(name, x)
    return math.prod(x.shape[:-1]), x.shape[-1]


def check_same(name: str, tensor: Tensor, like: Tensor, like_name: str = "x") -> None:
    """tensor has the shape, dtype and device of ``like``, and is contiguous."""
    for what, value, needed in (
        ("shape", tuple(tensor.shape), tuple(like.shape)),
        ("dtype", tensor.dtype, like.dtype),
        ("device", tensor.device, like.device),
    ):
        if value != needed:
            raise ValueError(f"{name} has {what} {value}, {like_name} has {needed}")
    check_contiguous(name, tensor)


def check_modulation(x: Tensor, **tensors: Tensor) -> None:
    """Each is (N, D) for x (N, T, D), in x's dtype or float32, rows at any stride."""
    needed = (x.shape[0], x.shape[2])
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != needed:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; x needs {needed}")
        _check_like(name, tensor, x)
        if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension, not 1")


def check_eps(eps: float) -> None:
    if not eps > 0:
        raise ValueError(f"eps {eps} is not above 0")


def check_qkv(qkv: Tensor, num_heads: int) -> tuple[int, int, int]:
    """(N, T, d) of qkv (N, T, 3·H·d): d is a multiple of 8, at most 128."""
    n, t, width = check_tokens("qkv", qkv)
    if not isinstance(num_heads, int):
        raise ValueError(f"num_heads {num_heads!r} is no integer")
    if num_heads < 1 or width % (3 * num_heads):
        raise ValueError(f"num_heads {num_heads} does not divide a third of qkv's width {width}")
    d = width // 3 // num_heads
    if d % 8 or d > HEAD_DIM_LIMIT:
        raise ValueError(f"head dimension {d}: multiples of 8 up to {HEAD_DIM_LIMIT} are supported")
    return n, t, d


def check_linear(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """x (…, K), weight (M, K) and bias (M,) of one dtype and device."""
    check_dtype("x", x)
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; x of shape {tuple(x.shape)} needs "
            f"(M, {x.shape[-1] if x.ndim else '?'})"
        )
    if weight.shape[1] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; (M, K) with K > 0 is needed")
    _check_channels("bias", bias, weight.shape[0])
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, x is {x.dtype} on {x.device}"
            )


def check_images(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> None:
    """x is (N, C, H, W) in channels-last memory, weight and bias (C,)."""
    check_dtype("x", x)
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)}; (N, C, H, W) with C, H, W > 0 is needed")
    check_channels_last("x", x)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups {groups} does not divide the {x.shape[1]} channels")
    for name, tensor in (("weight", weight), ("bias", bias)):
        _check_channels(name, tensor, x.shape[1])
        _check_like(name, tensor, x)
        check_contiguous(name, tensor)


def check_latents(z: Tensor, patch_size: int) -> tuple[int, int, int]:
    """(N, C, S) of float32 latents z (N, C, S, S), whose side the patches divide."""
    check_dtype("z", z, (torch.float32,))
    if z.ndim != 4 or z.shape[2] != z.shape[3] or 0 in z.shape[1:]:
        raise ValueError(f"z has shape {tuple(z.shape)}; (N, C, S, S) is needed")
    check_contiguous("z", z)
    if patch_size < 1 or z.shape[2] % patch_size:
        raise ValueError(f"patch_size {patch_size} does not divide the latent side {z.shape[2]}")
    return z.shape[0], z.shape[1], z.shape[2]


def check_guided_step(
    tokens: Tensor,
    z: Tensor,
    x0_before: Tensor,
    noise: Tensor,
    guidance_scale: Tensor,
    coefficients: Tensor,
    guided_channels: int,
    patch_size: int,
) -> None:
    """The shapes of `guided_step`; the latents are float32 and contiguous."""
    n, c, s = check_latents(z, patch_size)
    check_same("x0_before", x0_before, z, "z")
    check_same("noise", noise, z, "z")
    rows, t, width = check_tokens("tokens", tokens)
    patch = patch_size * patch_size
    if rows not in (n, 2 * n) or t * patch != s * s or width not in (c * patch, 2 * c * patch):
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}; latents {tuple(z.shape)} in patches of "
            f"{patch_size} need ({n} or {2 * n}, {s * s // patch}, {c * patch} or {2 * c * patch})"
        )
    check_exact("guidance_scale", guidance_scale, (n,))
    check_exact("coefficients", coefficients, (9,))
    if any(v.device != z.device for v in (tokens, guidance_scale, coefficients)):
        raise ValueError(f"tokens, guidance_scale and coefficients must be on {z.device}, as z is")
    if not 1 <= guided_channels <= c:
        raise ValueError(f"guided_channels {guided_channels} is out of range: allowed is 1 to {c}")


def check_codes(
    dtype: torch.dtype, allowed: Sequence[torch.dtype] = (torch.int8, torch.float8_e4m3fn)
) -> None:
    """dtype is one that codes may have."""
    if dtype not in allowed:
        raise ValueError(f"dtype {dtype}: choose {' or '.join(map(str, allowed))}")


def check_dtype(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """tensor has one of these dtypes."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: {_listed(dtypes)}")


def check_contiguous(name: str, tensor: Tensor) -> None:
    """The tensor's numbers lie one after another in memory."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} of strides {tensor.stride()} is not contiguous")


def check_channels_last(name: str, tensor: Tensor) -> None:
    """The images' channels lie one after another in memory."""
    if not tensor.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"{name} is not in torch.channels_last memory")


def check_exact(
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype] = (torch.float32,),
) -> None:
    """tensor is contiguous and has this shape and one of these dtypes."""
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype not in dtypes:
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}; {_listed(dtypes)} {tuple(shape)} is "
            "needed"
        )
    check_contiguous(name, tensor)


def _check_channels(name: str, tensor: Tensor, channels: int) -> None:
    if tuple(tensor.shape) != (channels,):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; ({channels},) is needed")


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    """tensor has x's dtype or float32, and x's device."""
    if tensor.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"{name} has dtype {tensor.dtype}; {x.dtype} or float32 is needed")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")


def _listed(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
