"""Inception-v3 as FID has it: the network of 2015, with the key names of its PyTorch port.

Architecture: Szegedy et al. 2015 (arXiv 1512.00567) as frozen in TensorFlow's
``inception-2015-12-05``, which differs from later ones in its poolings: averages leave the padding
out, the last block takes maxima, and there are 1008 outputs. Keys are those of
``pt_inception-2015-12-05-6726825d.pth``, which pytorch-fid publishes.

Images are resized and scaled as that graph does it, for the numbers to be those of Heusel et al.'s
and ADM's evaluators: bilinear with TensorFlow 1's sampling positions, then (x - 128) / 128.
pytorch-fid takes half-pixel centres and (x - 127.5) / 127.5, and its distances differ a little.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_bench.quality.inception_blocks import ConvNorm, block_a, block_b, block_c, block_d, block_e
from dit_engine.io.files import file_hash

IMAGE_SIZE = 299
FEATURES = 2048
SPATIAL_CHANNELS = 7
SPATIAL_FEATURES = 17 * 17 * SPATIAL_CHANNELS
CLASSES = 1008

WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SOURCE = "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights"
WEIGHTS_VARIABLE = "DIT_INCEPTION_WEIGHTS"
_DIGEST_PREFIX = "6726825d"  # of the file's SHA-256, by the custom of torch.hub


class InceptionV3(nn.Module):
    """The network; see `preprocess` for its input and `load_inception` for its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2, same=False)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, same=False)
        self.Mixed_5b = block_a(192, 32)
        self.Mixed_5c = block_a(256, 64)
        self.Mixed_5d = block_a(288, 64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b = block_c(768, 128)
        self.Mixed_6c = block_c(768, 160)
        self.Mixed_6d = block_c(768, 160)
        self.Mixed_6e = block_c(768, 192)
        self.Mixed_7a = block_d(768)
        self.Mixed_7b = block_e(1280, "average")
        self.Mixed_7c = block_e(2048, "max")
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, 3, 299, 299) → pooled (N, 2048), spatial (N, 2023), logits (N, 1008).

        pooled are FID's features. spatial are sFID's as ADM takes them: the first 7 channels of
        the graph's ``mixed_6/conv``, that is, of Mixed_6d's first branch, channels last. logits
        are without their bias, as ADM's and the original Inception Score have them.
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

    Pixel i is sampled at i·(size/side), without half-pixel centres, and nothing is smoothed where
    an image shrinks. Positions are float32, as there.
    """
    for dim in (3, 2):  # rows are mixed after columns, as there
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


def weights_digest(path: Path) -> str:
    """SHA-256 of the file, in hexadecimal."""
    return file_hash(path)


def is_published(digest: str) -> bool:
    """Whether a file of this SHA-256 is the published one, by the part of it in its name."""
    return digest.startswith(_DIGEST_PREFIX)


def load_inception(path: Path, dtype: torch.dtype = torch.float32) -> InceptionV3:
    """The network with the weights of ``path``, batch norms folded in, channels last.

    Raises ValueError where the file is no state dict of this network.
    """
    from dit_engine.checkpoint.weights import check_shapes, check_tensors, read_pickle

    state = read_pickle(path)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: holds no state dict; {WEIGHTS_FILE} does")
    with torch.device("meta"):
        model = InceptionV3()
    counters = "num_batches_tracked"  # of training; later files have them, and nothing reads them
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
