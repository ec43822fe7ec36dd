"""Inception-v3 as FID uses it: the network of 2015, with the key names of its PyTorch port.

Architecture: Szegedy et al. 2015 (arXiv 1512.00567, figures 5 to 7 and 10) as frozen in
TensorFlow's ``inception-2015-12-05``. Its pooling differs from that of later versions: averages
leave the padding out, and the last block takes maxima. It has 1008 outputs. The keys are those of
`WEIGHTS_FILE`, which pytorch-fid publishes.

Images are resized and scaled as in that graph, so that the numbers are those of Heusel et al.'s and
ADM's evaluators: bilinear with TensorFlow 1's sampling positions, then (x - 128) / 128. pytorch-fid
uses half-pixel centres and (x - 127.5) / 127.5, so its distances differ a little.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dit_engine.io.printable import one_line

IMAGE_SIZE = 299
FEATURES, CLASSES = 2048, 1008
SPATIAL_CHANNELS = 7
SPATIAL_FEATURES = 17 * 17 * SPATIAL_CHANNELS
WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"
DIGEST = "6726825d"  # the file's SHA-256 begins with it, as torch.hub has it in file names
_TENSORS = 94 * 5 + 2  # in the file: of 94 convolutions with their batch norms, and of "fc"
_SOURCE = "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights"
_VARIABLE = "DIT_INCEPTION_WEIGHTS"

# The branches of the blocks (figures 5, 10, 6, 10 and 7), each a chain of convolutions. One with
# "?" is a fork: two convolutions of the same input, "a" (1×3) and "b" (3×1), concatenated.
_A = ("1x1", "5x5_1 5x5_2", "3x3dbl_1 3x3dbl_2 3x3dbl_3")
_B = ("3x3", "3x3dbl_1 3x3dbl_2 3x3dbl_3")
_C = ("1x1", "7x7_1 7x7_2 7x7_3", "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5")
_D = ("3x3_1 3x3_2", "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4")
_E = ("1x1", "3x3_1 3x3_2?", "3x3dbl_1 3x3dbl_2 3x3dbl_3?")


class InceptionV3:
    """The network; see `preprocess` for its input and `load_inception` for its weights.

    convolutions: name → weight and bias, with the batch norm folded in. classifier: (1008, 2048).
    """

    def __init__(
        self, convolutions: Mapping[str, tuple[Tensor, Tensor]], classifier: Tensor
    ) -> None:
        self.convolutions, self.classifier = convolutions, classifier

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, 3, 299, 299) → pooled (N, 2048), spatial (N, 2023), logits (N, 1008).

        pooled are FID's features. spatial are sFID's as in ADM: the first 7 channels of the
        graph's ``mixed_6/conv``, which is Mixed_6d's first branch, with channels last. logits are
        without their bias, as in ADM and in the original Inception Score.
        """
        x = self._conv(x, "Conv2d_1a_3x3", 2, same=False)  # (N, 32, 149, 149)
        x = self._conv(x, "Conv2d_2a_3x3", same=False)
        x = F.max_pool2d(self._conv(x, "Conv2d_2b_3x3"), 3, stride=2)  # (N, 64, 73, 73)
        x = self._conv(self._conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3", same=False)
        x = F.max_pool2d(x, 3, stride=2)  # (N, 192, 35, 35)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self._block(x, name, _A)
        x = self._block(x, "Mixed_6a", _B, "halve")  # (N, 768, 17, 17)
        for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d"):
            x = self._block(x, name, _C)
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (N, 17·17·7)
        x = self._block(x, "Mixed_6e", _C)
        x = self._block(x, "Mixed_7a", _D, "halve")  # (N, 1280, 8, 8)
        x = self._block(x, "Mixed_7b", _E)
        x = self._block(x, "Mixed_7c", _E, "maximum")  # (N, 2048, 8, 8)
        pooled = x.mean(dim=(2, 3))
        return pooled, spatial, F.linear(pooled, self.classifier)

    def _conv(self, x: Tensor, name: str, stride: int = 1, same: bool = True) -> Tensor:
        """Convolution and ReLU. same: pad, so that the size stays."""
        weight, bias = self.convolutions[name]
        padding = (weight.shape[2] // 2, weight.shape[3] // 2) if same else 0
        return F.relu(F.conv2d(x, weight, bias, stride, padding), inplace=True)

    def _block(
        self, x: Tensor, block: str, branches: tuple[str, ...], pool: str = "average"
    ) -> Tensor:
        """Parallel branches and, last, a pooled one; their channels are concatenated in this order.

        pool: the "average" or "maximum" of 3×3, followed by a convolution; or "halve": a maximum
        with stride 2 and no convolution, and stride 2 in the last convolution of each branch.
        """
        parts = []
        for branch in branches:
            *chain, last = (f"{block}.branch{name}" for name in branch.split())
            y = x
            for name in chain:
                y = self._conv(y, name)
            if pool == "halve":
                parts.append(self._conv(y, last, 2, same=False))
            else:
                ends = (last[:-1] + "a", last[:-1] + "b") if last.endswith("?") else (last,)
                parts += [self._conv(y, name) for name in ends]
        if pool == "halve":
            return torch.cat([*parts, F.max_pool2d(x, 3, stride=2)], dim=1)
        if pool == "maximum":
            pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        else:
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return torch.cat([*parts, self._conv(pooled, f"{block}.branch_pool")], dim=1)


def preprocess(images: Tensor) -> Tensor:
    """Images uint8 (N, H, W, 3) → network input (N, 3, 299, 299), channels last, in [-1, 1)."""
    pixels = resize_tf1(images.permute(0, 3, 1, 2).float(), IMAGE_SIZE)
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
    named = path or os.environ.get(_VARIABLE)
    if named and Path(named).is_file():
        return Path(named)
    what = f"Inception-v3 weights {named} are not a file" if named else "no Inception-v3 weights"
    raise FileNotFoundError(
        f"{what}: download {WEIGHTS_FILE} from {_SOURCE} and name it by --inception-weights or "
        f"{_VARIABLE}; --features lite0 needs no file"
    )


def load_inception(path: Path, device: torch.device | str = "cpu") -> InceptionV3:
    """The network with the weights in ``path``, in float32.

    Raises ValueError if the file does not hold a state dict of this network.
    """
    from dit_engine.checkpoint.weights import check_tensors, read_pickle

    state = read_pickle(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds no state dict; {WEIGHTS_FILE} does")
    counters = "num_batches_tracked"  # counted by newer PyTorch in training; nothing reads them
    state = {key: value for key, value in state.items() if not str(key).endswith(counters)}
    state = check_tensors(state, path)
    names = [key.removesuffix(".conv.weight") for key in state if key.endswith(".conv.weight")]
    try:
        if len(state) > _TENSORS or state["fc.weight"].shape != (CLASSES, FEATURES):
            raise RuntimeError(f"{len(state)} tensors, fc.weight {tuple(state['fc.weight'].shape)}")
        parts = {name: folded(state, f"{name}.conv", f"{name}.bn", device) for name in names}
        model = InceptionV3(parts, state["fc.weight"].to(device, torch.float32))
        # This uses every convolution, and any other shape is an error.
        model(torch.zeros(1, 3, 75, 75, device=device))
    except (KeyError, RuntimeError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else one_line(error)
        raise ValueError(f"{path}: not the weights of {WEIGHTS_FILE}: {why}") from None
    return model


def folded(
    state: Mapping[str, Tensor],
    conv: str,
    norm: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Weight, with channels last, and bias of a convolution with the batch norm after it, which
    has ε = 0.001, folded in; computed in float64."""
    gamma, beta, mean, variance = (
        state[f"{norm}.{key}"].double() for key in ("weight", "bias", "running_mean", "running_var")
    )
    kernel = state[f"{conv}.weight"].double()
    weight, bias = fuse_conv_bn_weights(kernel, None, mean, variance, 1e-3, gamma, beta)
    weight = weight.detach().to(device, dtype, memory_format=torch.channels_last)
    return weight, bias.detach().to(device, dtype)
