"""A state dict for Inception-v3 that is the same everywhere, with the published file's keys.

The table stands for the published file. It is written from the layout of the network and not from
our code: of each convolution the name, input and output channels, kernel height and width. The
numbers of the state dict are a generator's raw bits, whose stream numpy keeps.
"""

from __future__ import annotations

import math

import numpy as np
import torch

_STEM = "1a_3x3 3 32 3 3, 2a_3x3 32 32 3 3, 2b_3x3 32 64 3 3, 3b_1x1 64 80 1 1, 4a_3x3 80 192 3 3"
_DOUBLE = "3x3dbl_1 {i} 64 1 1, 3x3dbl_2 64 96 3 3, 3x3dbl_3 96 96 3 3"
# {i}: channels in, {p}: of the pooling's branch, {n}: narrow
_A = f"1x1 {{i}} 64 1 1, 5x5_1 {{i}} 48 1 1, 5x5_2 48 64 5 5, {_DOUBLE}, _pool {{i}} {{p}} 1 1"
_B = f"3x3 {{i}} 384 3 3, {_DOUBLE}"
_C = (
    "1x1 {i} 192 1 1, 7x7_1 {i} {n} 1 1, 7x7_2 {n} {n} 1 7, 7x7_3 {n} 192 7 1, "
    "7x7dbl_1 {i} {n} 1 1, 7x7dbl_2 {n} {n} 7 1, 7x7dbl_3 {n} {n} 1 7, 7x7dbl_4 {n} {n} 7 1, "
    "7x7dbl_5 {n} 192 1 7, _pool {i} 192 1 1"
)
_D = (
    "3x3_1 {i} 192 1 1, 3x3_2 192 320 3 3, 7x7x3_1 {i} 192 1 1, 7x7x3_2 192 192 1 7, "
    "7x7x3_3 192 192 7 1, 7x7x3_4 192 192 3 3"
)
_E = (
    "1x1 {i} 320 1 1, 3x3_1 {i} 384 1 1, 3x3_2a 384 384 1 3, 3x3_2b 384 384 3 1, "
    "3x3dbl_1 {i} 448 1 1, 3x3dbl_2 448 384 3 3, 3x3dbl_3a 384 384 1 3, 3x3dbl_3b 384 384 3 1, "
    "_pool {i} 192 1 1"
)
_BLOCKS = {
    "5b": _A.format(i=192, p=32), "5c": _A.format(i=256, p=64), "5d": _A.format(i=288, p=64),
    "6a": _B.format(i=288), "6b": _C.format(i=768, n=128), "6c": _C.format(i=768, n=160),
    "6d": _C.format(i=768, n=160), "6e": _C.format(i=768, n=192), "7a": _D.format(i=768),
    "7b": _E.format(i=1280), "7c": _E.format(i=2048),
}  # fmt: skip


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Every key of the published file and its shape, in its order."""
    lines = [f"Conv2d_{line}" for line in _STEM.split(", ")]
    for block, layout in _BLOCKS.items():
        lines += [f"Mixed_{block}.branch{line}" for line in layout.split(", ")]
    shapes: dict[str, tuple[int, ...]] = {}
    for line in lines:
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
    parts = uniform.split([math.prod(shape) for shape in shapes.values()])
    state = {}
    for (key, shape), part in zip(shapes.items(), parts, strict=True):
        if key.endswith(("conv.weight", "fc.weight")):
            values = part * math.sqrt(6 / math.prod(shape[1:]))
        elif key.endswith("running_var"):
            values = 1 + 0.5 * part
        elif key.endswith("bn.weight"):
            values = 1 + 0.2 * part
        else:
            values = 0.2 * part
        state[key] = values.reshape(shape).clone()
    return state
