"""A state dict for Inception-v3 that is the same everywhere, with the published file's keys.

The table stands for the published file: one line a convolution, written from the layout of the
network and not from our code. Its numbers are a generator's raw bits, whose stream numpy keeps.
"""

from __future__ import annotations

import math

import numpy as np
import torch

# name: input channels, output channels, kernel height, kernel width
_STEM = """
Conv2d_1a_3x3 3 32 3 3
Conv2d_2a_3x3 32 32 3 3
Conv2d_2b_3x3 32 64 3 3
Conv2d_3b_1x1 64 80 1 1
Conv2d_4a_3x3 80 192 3 3
"""
# {i}: channels in, {p}: of the pooling's branch, {n}: narrow
_A = """
branch1x1 {i} 64 1 1
branch5x5_1 {i} 48 1 1
branch5x5_2 48 64 5 5
branch3x3dbl_1 {i} 64 1 1
branch3x3dbl_2 64 96 3 3
branch3x3dbl_3 96 96 3 3
branch_pool {i} {p} 1 1
"""
_B = """
branch3x3 {i} 384 3 3
branch3x3dbl_1 {i} 64 1 1
branch3x3dbl_2 64 96 3 3
branch3x3dbl_3 96 96 3 3
"""
_C = """
branch1x1 {i} 192 1 1
branch7x7_1 {i} {n} 1 1
branch7x7_2 {n} {n} 1 7
branch7x7_3 {n} 192 7 1
branch7x7dbl_1 {i} {n} 1 1
branch7x7dbl_2 {n} {n} 7 1
branch7x7dbl_3 {n} {n} 1 7
branch7x7dbl_4 {n} {n} 7 1
branch7x7dbl_5 {n} 192 1 7
branch_pool {i} 192 1 1
"""
_D = """
branch3x3_1 {i} 192 1 1
branch3x3_2 192 320 3 3
branch7x7x3_1 {i} 192 1 1
branch7x7x3_2 192 192 1 7
branch7x7x3_3 192 192 7 1
branch7x7x3_4 192 192 3 3
"""
_E = """
branch1x1 {i} 320 1 1
branch3x3_1 {i} 384 1 1
branch3x3_2a 384 384 1 3
branch3x3_2b 384 384 3 1
branch3x3dbl_1 {i} 448 1 1
branch3x3dbl_2 448 384 3 3
branch3x3dbl_3a 384 384 1 3
branch3x3dbl_3b 384 384 3 1
branch_pool {i} 192 1 1
"""
_BLOCKS = (
    ("Mixed_5b", _A.format(i=192, p=32)),
    ("Mixed_5c", _A.format(i=256, p=64)),
    ("Mixed_5d", _A.format(i=288, p=64)),
    ("Mixed_6a", _B.format(i=288)),
    ("Mixed_6b", _C.format(i=768, n=128)),
    ("Mixed_6c", _C.format(i=768, n=160)),
    ("Mixed_6d", _C.format(i=768, n=160)),
    ("Mixed_6e", _C.format(i=768, n=192)),
    ("Mixed_7a", _D.format(i=768)),
    ("Mixed_7b", _E.format(i=1280)),
    ("Mixed_7c", _E.format(i=2048)),
)


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Every key of the published file and its shape, in its order."""
    lines = _STEM.split("\n")
    for block, layout in _BLOCKS:
        lines += [f"{block}.{line}" for line in layout.split("\n") if line]
    shapes: dict[str, tuple[int, ...]] = {}
    for line in filter(None, lines):
        name, *numbers = line.split()
        inputs, outputs, height, width = map(int, numbers)
        shapes[f"{name}.conv.weight"] = (outputs, inputs, height, width)
        for key in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{key}"] = (outputs,)
    return shapes | {"fc.weight": (1008, 2048), "fc.bias": (1008,)}


def random_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights that keep the activations' size through the layers, biased both ways."""
    shapes = published_shapes()
    count = sum(math.prod(shape) for shape in shapes.values())
    raw = np.random.PCG64(seed).random_raw((count + 3) // 4).view(np.uint16)[:count]
    uniform = torch.from_numpy(raw.astype(np.float32) / 2**15 - 1)  # [-1, 1)
    state, start = {}, 0
    for key, shape in shapes.items():
        values = uniform[start : start + math.prod(shape)].reshape(shape)
        start += values.numel()
        if key.endswith(("conv.weight", "fc.weight")):
            values = values * math.sqrt(6 / math.prod(shape[1:]))
        elif key.endswith("running_var"):
            values = 1 + 0.5 * values
        elif key.endswith("bn.weight"):
            values = 1 + 0.2 * values
        else:
            values = 0.2 * values
        state[key] = values.contiguous()
    return state
