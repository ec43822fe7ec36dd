"""What the public operators ask of their arguments; every refusal is one line."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIM_LIMIT = 128


def check_tokens(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """x is (N, T, D) with T and D above 0, its rows one after another in memory."""
    _check_floating(name, x, dtypes)
    if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; (N, T, D) with T, D > 0 is needed")
    _check_contiguous(name, x)


def check_same(name: str, tensor: Tensor, like: Tensor, like_name: str = "x") -> None:
    """tensor has the shape, dtype and device of ``like``, and is contiguous."""
    for what, value, needed in (
        ("shape", tuple(tensor.shape), tuple(like.shape)),
        ("dtype", tensor.dtype, like.dtype),
        ("device", tensor.device, like.device),
    ):
        if value != needed:
            raise ValueError(f"{name} has {what} {value}, {like_name} has {needed}")
    _check_contiguous(name, tensor)


def check_modulation(x: Tensor, **tensors: Tensor) -> None:
    """Each is (N, D) for x (N, T, D), in x's dtype or float32, rows at any stride."""
    needed = (x.shape[0], x.shape[2])
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != needed:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; x needs {needed}")
        if tensor.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name} has dtype {tensor.dtype}; {x.dtype} or float32 is needed")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension, not 1")


def check_eps(eps: float) -> None:
    if not eps > 0:
        raise ValueError(f"eps {eps} is not above 0")


def check_qkv(qkv: Tensor, num_heads: int) -> None:
    """qkv is (N, T, 3·H·d) with a head dimension d that is a multiple of 8, at most 128."""
    check_tokens("qkv", qkv)
    width = qkv.shape[2]
    if not isinstance(num_heads, int):
        raise ValueError(f"num_heads {num_heads!r} is no integer")
    if num_heads < 1 or width % (3 * num_heads):
        raise ValueError(f"num_heads {num_heads} does not divide a third of qkv's width {width}")
    d = width // 3 // num_heads
    if d % 8 or d > HEAD_DIM_LIMIT:
        raise ValueError(f"head dimension {d}: multiples of 8 up to {HEAD_DIM_LIMIT} are supported")


def check_linear(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """x (…, K), weight (M, K) and bias (M,) of one dtype and device."""
    _check_floating("x", x, DTYPES)
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; x of shape {tuple(x.shape)} needs "
            f"(M, {x.shape[-1] if x.ndim else '?'})"
        )
    if weight.shape[1] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; (M, K) with K > 0 is needed")
    if tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; ({weight.shape[0]},) is needed")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, x is {x.dtype} on {x.device}"
            )


def check_images(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> None:
    """x is (N, C, H, W) in channels-last memory, weight and bias (C,)."""
    _check_floating("x", x, DTYPES)
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)}; (N, C, H, W) with C, H, W > 0 is needed")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError("x is not in torch.channels_last memory")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups {groups} does not divide the {x.shape[1]} channels")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tuple(tensor.shape) != (x.shape[1],):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; ({x.shape[1]},) is needed")
        if tensor.dtype not in (x.dtype, torch.float32) or tensor.device != x.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}; {x.dtype} or float32 on {x.device} "
                "is needed"
            )
        _check_contiguous(name, tensor)


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
    _check_floating("z", z, (torch.float32,))
    if z.ndim != 4 or z.shape[2] != z.shape[3] or 0 in z.shape[1:]:
        raise ValueError(f"z has shape {tuple(z.shape)}; (N, C, S, S) is needed")
    _check_contiguous("z", z)
    n, c, s, _ = z.shape
    check_same("x0_before", x0_before, z, "z")
    check_same("noise", noise, z, "z")
    if patch_size < 1 or s % patch_size:
        raise ValueError(f"patch_size {patch_size} does not divide the latent side {s}")
    check_tokens("tokens", tokens)
    rows, t, width = tokens.shape
    patch = patch_size * patch_size
    if rows not in (n, 2 * n) or t * patch != s * s or width not in (c * patch, 2 * c * patch):
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}; latents {tuple(z.shape)} in patches of "
            f"{patch_size} need ({n} or {2 * n}, {s * s // patch}, {c * patch} or {2 * c * patch})"
        )
    for name, tensor, size in (("guidance_scale", guidance_scale, n),
                               ("coefficients", coefficients, 9)):  # fmt: skip
        if tuple(tensor.shape) != (size,) or tensor.dtype != torch.float32:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; float32 ({size},) is needed"
            )
        _check_contiguous(name, tensor)
    if any(v.device != z.device for v in (tokens, guidance_scale, coefficients)):
        raise ValueError(f"tokens, guidance_scale and coefficients must be on {z.device}, as z is")
    if not 1 <= guided_channels <= c:
        raise ValueError(f"guided_channels {guided_channels} is out of range: allowed is 1 to {c}")


def check_rows(name: str, x: Tensor) -> None:
    """x is (…, D) with D above 0, contiguous."""
    _check_floating(name, x, DTYPES)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; (…, D) with D > 0 is needed")
    _check_contiguous(name, x)


def check_codes(dtype: torch.dtype) -> None:
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"dtype {dtype}: choose torch.int8 or torch.float8_e4m3fn")


def _check_floating(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: {allowed}")


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} of strides {tensor.stride()} is not contiguous")
