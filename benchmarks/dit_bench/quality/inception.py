"""Inception-v3 as FID uses it: the network of 2015, with the key names of its PyTorch port.

Architecture: Szegedy et al. 2015 (arXiv 1512.00567, figures 5 to 7 and 10) as frozen in
TensorFlow's ``inception-2015-12-05``. Its poolings differ from those of later versions: averages
leave the padding out and the last block takes maxima. It has 1008 outputs. The keys are those of
``pt_inception-2015-12-05-6726825d.pth``, which pytorch-fid publishes.

Images are resized and scaled as in that graph, so that the numbers are those of Heusel et al.'s and
ADM's evaluators: bilinear with TensorFlow 1's sampling positions, then (x - 128) / 128. pytorch-fid
uses half-pixel centres and (x - 127.5) / 127.5, and its distances differ a little.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

IMAGE_SIZE = 299
FEATURES = 2048
SPATIAL_CHANNELS = 7
SPATIAL_FEATURES = 17 * 17 * SPATIAL_CHANNELS
CLASSES = 1008

WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SOURCE = "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights"
WEIGHTS_VARIABLE = "DIT_INCEPTION_WEIGHTS"
_DIGEST_PREFIX = "6726825d"  # of the file's SHA-256, which torch.hub puts into file names
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
        """Fold the batch norm into the convolution, in float64; weights become channels last."""
        assert isinstance(self.bn, nn.BatchNorm2d)
        dtype = self.conv.weight.dtype
        self.conv = fuse_conv_bn_eval(self.conv.double(), self.bn.double())
        weight = self.conv.weight.to(dtype, memory_format=torch.channels_last)
        self.conv.weight = nn.Parameter(weight, requires_grad=False)
        self.conv.to(dtype).requires_grad_(False)
        self.bn = nn.Identity()


class Block(nn.Module):
    """Parallel branches whose channels are concatenated in order, with a pooling branch last.

    Args:
        inputs: input channels.
        branches: each is a chain of steps. A step named "…_2?" or "…_3?" is a fork: a 1×3 ("a")
            and a 3×1 ("b") convolution of the same input, concatenated.
        pool_outputs: channels of the 1×1 convolution after the 3×3 pooling. None: there is no such
            convolution, and the block halves the height and width, by stride 2 in the pooling
            (which is then a maximum) and in each branch's last step.
        pool: "average" or "max".
    """

    def __init__(
        self,
        inputs: int,
        branches: Sequence[Sequence[Step]],
        pool_outputs: int | None = None,
        pool: str = "average",
    ) -> None:
        super().__init__()
        self.pool, self.halves = pool, pool_outputs is None
        self.branches: list[list[tuple[str, ...]]] = []
        for branch in branches:
            chain: list[tuple[str, ...]] = []
            width = inputs
            for name, outputs, kernel in branch:
                if name.endswith("?"):
                    parts = {name[:-1] + "a": (1, 3), name[:-1] + "b": (3, 1)}
                    convs = {key: ConvNorm(width, outputs, shape) for key, shape in parts.items()}
                else:
                    last = self.halves and name == branch[-1][0]
                    convs = {name: ConvNorm(width, outputs, kernel, 2 if last else 1, not last)}
                for key, conv in convs.items():
                    self.add_module(key, conv)
                chain.append(tuple(convs))
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


def _block_a(inputs: int, pool_outputs: int) -> Block:
    branches: list[list[Step]] = [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        _DOUBLE_3X3,
    ]
    return Block(inputs, branches, pool_outputs)


def _block_c(inputs: int, narrow: int) -> Block:
    n, wide, tall = narrow, (1, 7), (7, 1)
    double: list[tuple[int, Kernel]] = [(n, 1), (n, tall), (n, wide), (n, tall), (192, wide)]
    branches: list[list[Step]] = [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", n, 1), ("branch7x7_2", n, wide), ("branch7x7_3", 192, tall)],
        [(f"branch7x7dbl_{i}", *step) for i, step in enumerate(double, 1)],
    ]
    return Block(inputs, branches, 192)


def _block_e(inputs: int, pool: str) -> Block:
    branches: list[list[Step]] = [
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), ("branch3x3_2?", 384, 3)],
        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), ("branch3x3dbl_3?", 384, 3)],
    ]
    return Block(inputs, branches, 192, pool)


_DOUBLE_3X3: list[Step] = [
    ("branch3x3dbl_1", 64, 1),
    ("branch3x3dbl_2", 96, 3),
    ("branch3x3dbl_3", 96, 3),
]
_BLOCK_B: list[list[Step]] = [[("branch3x3", 384, 3)], _DOUBLE_3X3]
_BLOCK_D: list[list[Step]] = [
    [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)],
    [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
     ("branch7x7x3_4", 192, 3)],
]  # fmt: skip


class InceptionV3(nn.Module):
    """The network; see `preprocess` for its input and `load_inception` for its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2, same=False)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, same=False)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = Block(288, _BLOCK_B)
        self.Mixed_6b = _block_c(768, 128)
        self.Mixed_6c = _block_c(768, 160)
        self.Mixed_6d = _block_c(768, 160)
        self.Mixed_6e = _block_c(768, 192)
        self.Mixed_7a = Block(768, _BLOCK_D)
        self.Mixed_7b = _block_e(1280, "average")
        self.Mixed_7c = _block_e(2048, "max")
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, 3, 299, 299) → pooled (N, 2048), spatial (N, 2023), logits (N, 1008).

        pooled are FID's features. spatial are sFID's as in ADM: the first 7 channels of the
        graph's ``mixed_6/conv``, which is Mixed_6d's first branch, with channels last. logits are
        without their bias, as in ADM and in the original Inception Score.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (N, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)  # (N, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (N, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)  # (N, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (N, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (N, 768, 17, 17)
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (N, 17·17·7)
        x = self.Mixed_7a(self.Mixed_6e(x))  # (N, 1280, 8, 8)
        x = self.Mixed_7c(self.Mixed_7b(x))  # (N, 2048, 8, 8)
        pooled = x.mean(dim=(2, 3))  # (N, 2048)
        return pooled, spatial, F.linear(pooled, self.fc.weight)


def preprocess(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images uint8 (N, H, W, 3) → network input (N, 3, 299, 299), channels last, in [-1, 1)."""
    pixels = resize_tf1(images.permute(0, 3, 1, 2).to(dtype), IMAGE_SIZE)
    return pixels.sub(128.0).div(128.0).contiguous(memory_format=torch.channels_last)


def resize_tf1(images: Tensor, side: int) -> Tensor:
    """Bilinear as TensorFlow 1's ``resize_bilinear(align_corners=False)``: (N, C, side, side).

    Pixel i is sampled at i·(size/side), without half-pixel centres, and nothing is smoothed when
    an image shrinks. Positions are float32, as in TensorFlow.
    """
    for dim in (3, 2):  # along the width first, as in TensorFlow
        size = images.shape[dim]
        scale = torch.tensor(size / side, dtype=torch.float32)
        position = torch.arange(side, dtype=torch.float32) * scale
        low = position.long()
        weight = (position - low).to(images)
        high = (low + 1).clamp(max=size - 1)
        low, high = low.to(images.device), high.to(images.device)
        before, after = images.index_select(dim, low), images.index_select(dim, high)
        images = before + (after - before) * (weight if dim == 3 else weight[:, None])
    return images


def find_weights(path: Path | None = None) -> Path:
    """``path``, or the file that DIT_INCEPTION_WEIGHTS names. FileNotFoundError without either."""
    named = path or os.environ.get(WEIGHTS_VARIABLE)
    if not named:
        raise FileNotFoundError(
            f"no Inception-v3 weights: download {WEIGHTS_FILE} from {WEIGHTS_SOURCE} and name it "
            f"by --inception-weights or {WEIGHTS_VARIABLE}; --features lite0 needs no file"
        )
    found = Path(named)
    if not found.is_file():
        raise FileNotFoundError(
            f"Inception-v3 weights {found} are not a file; {WEIGHTS_FILE} from {WEIGHTS_SOURCE} "
            "is needed"
        )
    return found


def is_published(digest: str) -> bool:
    """Whether this SHA-256 belongs to the published file, whose name holds its beginning."""
    return digest.startswith(_DIGEST_PREFIX)


def load_inception(path: Path, dtype: torch.dtype = torch.float32) -> InceptionV3:
    """The network with the weights in ``path``, batch norms folded in, channels last.

    Raises ValueError if the file does not hold a state dict of this network.
    """
    from dit_engine.checkpoint.weights import check_shapes, check_tensors, read_pickle

    state = read_pickle(path)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: holds no state dict; {WEIGHTS_FILE} does")
    with torch.device("meta"):
        model = InceptionV3()
    counters = "num_batches_tracked"  # counted by newer PyTorch in training; nothing reads them
    state = {key: value for key, value in state.items() if not str(key).endswith(counters)}
    state = check_tensors(state, path)
    expected = {k: v.shape for k, v in model.state_dict().items() if not k.endswith(counters)}
    try:
        check_shapes(state, expected)
    except ValueError as error:
        raise ValueError(f"{path}: not the weights of {WEIGHTS_FILE}: {error}") from None
    model.load_state_dict(
        {key: value.to(dtype) for key, value in state.items()}, assign=True, strict=False
    )
    model.eval().requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, ConvNorm):
            module.fold()
    return model
