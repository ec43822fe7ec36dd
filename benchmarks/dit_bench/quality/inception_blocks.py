"""The blocks that Inception-v3 is made of, with the names of its PyTorch ports.

Szegedy et al. 2015 (arXiv 1512.00567), figures 5 to 7 and 10, with the poolings of the graph that
FID uses: averages leave the padding out, and the last block takes maxima.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_BN_EPS = 1e-3
Kernel = int | tuple[int, int]
Step = tuple[str, int, Kernel]
"""name, output channels, kernel (height, width)"""


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Kernel, stride: int = 1, same: bool = True
    ) -> None:
        super().__init__()
        h, w = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (h // 2, w // 2) if same else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, (h, w), stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(outputs, eps=_BN_EPS)

    def forward(self, x: Tensor) -> Tensor:  # (N, C_in, H, W) → (N, C_out, H', W')
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self) -> None:
        """Put the batch norm into the convolution, channels last; float64 inside."""
        assert isinstance(self.bn, nn.BatchNorm2d)
        dtype = self.conv.weight.dtype
        self.conv = fuse_conv_bn_eval(self.conv.double(), self.bn.double())
        weight = self.conv.weight.to(dtype, memory_format=torch.channels_last)
        self.conv.weight = nn.Parameter(weight, requires_grad=False)
        self.conv.to(dtype).requires_grad_(False)
        self.bn = nn.Identity()


class Block(nn.Module):
    """Branches side by side, their channels concatenated in order, that of the pooling last.

    Args:
        inputs: channels in.
        branches: each a chain of steps. A step named "…_2?" or "…_3?" is a fork: a 1×3 ("a") and a
            3×1 ("b") convolution of the same, concatenated.
        pool: "average" or "max", 3×3.
        pool_outputs: channels of the 1×1 convolution behind the pooling. None: there is none, and
            the block halves the side, by stride 2 in the pooling and in each branch's last step.
    """

    def __init__(
        self,
        inputs: int,
        branches: Sequence[Sequence[Step]],
        pool: str,
        pool_outputs: int | None,
    ) -> None:
        super().__init__()
        halves = pool_outputs is None
        self.pool, self.halves = pool, halves
        self.branches: list[list[tuple[str, ...]]] = []
        for branch in branches:
            chain: list[tuple[str, ...]] = []
            width = inputs
            for name, outputs, kernel in branch:
                if name.endswith("?"):
                    pair = (name[:-1] + "a", name[:-1] + "b")
                    for key, shape in zip(pair, ((1, 3), (3, 1)), strict=True):
                        self.add_module(key, ConvNorm(width, outputs, shape))
                    chain.append(pair)
                else:
                    reduces = halves and name == branch[-1][0]
                    conv = ConvNorm(width, outputs, kernel, 2 if reduces else 1, same=not reduces)
                    self.add_module(name, conv)
                    chain.append((name,))
                width = outputs
            self.branches.append(chain)
        if pool_outputs is not None:
            self.branch_pool = ConvNorm(inputs, pool_outputs, 1)

    def forward(self, x: Tensor) -> Tensor:  # (N, C_in, H, W) → (N, C_out, H', W')
        parts = []
        for chain in self.branches:
            y = x
            for names in chain:
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            parts.append(y)
        if self.halves:
            return torch.cat([*parts, F.max_pool2d(x, 3, stride=2)], dim=1)
        if self.pool == "max":
            pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        else:
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return torch.cat([*parts, self.branch_pool(pooled)], dim=1)


def block_a(inputs: int, pool_outputs: int) -> Block:
    branches: list[list[Step]] = [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
    ]
    return Block(inputs, branches, "average", pool_outputs)


def block_b(inputs: int) -> Block:
    branches: list[list[Step]] = [
        [("branch3x3", 384, 3)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
    ]
    return Block(inputs, branches, "max", None)


def block_c(inputs: int, narrow: int) -> Block:
    wide, tall = (1, 7), (7, 1)
    shapes: list[Kernel] = [1, tall, wide, tall, wide]
    widths = [narrow, narrow, narrow, narrow, 192]
    double: list[Step] = [
        (f"branch7x7dbl_{i + 1}", width, shape)
        for i, (width, shape) in enumerate(zip(widths, shapes, strict=True))
    ]
    branches: list[list[Step]] = [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", narrow, 1), ("branch7x7_2", narrow, wide), ("branch7x7_3", 192, tall)],
        double,
    ]
    return Block(inputs, branches, "average", 192)


def block_d(inputs: int) -> Block:
    branches: list[list[Step]] = [
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)],
        [
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3),
        ],
    ]
    return Block(inputs, branches, "max", None)


def block_e(inputs: int, pool: str) -> Block:
    branches: list[list[Step]] = [
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), ("branch3x3_2?", 384, 3)],
        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), ("branch3x3dbl_3?", 384, 3)],
    ]
    return Block(inputs, branches, pool, 192)
