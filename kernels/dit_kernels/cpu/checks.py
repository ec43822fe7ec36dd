"""What native kernels ask of tensors before they get their addresses."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from dit_kernels.cpu.loader import DTYPES


def pointer_of(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def unsigned_codes(dtype: torch.dtype) -> int:
    if dtype not in (torch.int8, torch.uint8):
        raise ValueError(f"dtype {dtype}: native codes are torch.int8 or torch.uint8")
    return int(dtype == torch.uint8)


def check_contiguous(
    name: str, tensor: Tensor, dtypes: Collection[torch.dtype] | None = tuple(DTYPES)
) -> None:
    if dtypes is not None and tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed: {allowed}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}; the CPU is needed")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} of strides {tensor.stride()} is not contiguous")


def check_layout(
    name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype | None
) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {tuple(shape)} is needed")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}; {dtype} is needed")


def check_exactly(
    name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype | None
) -> None:
    check_contiguous(name, tensor, tuple(DTYPES) if dtype is None else None)
    check_layout(name, tensor, shape, dtype)


def check_tokens(x: Tensor, name: str = "x") -> tuple[int, int, int]:
    check_contiguous(name, x)
    if x.ndim != 3 or x.shape[2] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; (N, T, D) with D > 0 is needed")
    return x.shape[0], x.shape[1], x.shape[2]


def check_rows(x: Tensor) -> tuple[int, int]:
    check_contiguous("x", x)
    if x.ndim < 1 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; (…, D) with D > 0 is needed")
    return math.prod(x.shape[:-1]), x.shape[-1]


def check_images(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES or x.device.type != "cpu":
        raise ValueError(f"{name} is {x.dtype} on {x.device}; float32, bfloat16 or float16 on cpu")
    if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"{name} {tuple(x.shape)} is not (N, C, H, W) in channels-last memory")


def check_modulation(n: int, d: int, **tensors: Tensor) -> tuple[list[int], list[int]]:
    """Strides and dtypes of tensors (N, D) with rows anywhere."""
    for name, tensor in tensors.items():
        check_layout(name, tensor, (n, d), None)
        if tensor.dtype not in DTYPES or tensor.device.type != "cpu":
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}")
        if tensor.stride(1) != 1 and d > 1:
            raise ValueError(f"{name} has stride {tensor.stride(1)} in its last dimension, not 1")
    return [v.stride(0) for v in tensors.values()], [DTYPES[v.dtype] for v in tensors.values()]


def result(name: str, out: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if dtype not in (*DTYPES, torch.int8, torch.uint8):
        raise ValueError(f"dtype {dtype}: choose float32, bfloat16 or float16")
    if out is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    check_contiguous(name, out, None)
    check_layout(name, out, shape, dtype)
    return out


def results(
    out: Sequence[Tensor] | None, *needed: tuple[Sequence[int], torch.dtype]
) -> list[Tensor]:
    if out is None:
        return [result("out", None, *each) for each in needed]
    if len(out) != len(needed):
        raise ValueError(f"out has {len(out)} tensors; {len(needed)} are needed")
    return [
        result(f"out[{i}]", tensor, *each)
        for i, (tensor, each) in enumerate(zip(out, needed, strict=True))
    ]
