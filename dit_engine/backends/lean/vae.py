"""The fast decoder of a VAE: it computes what `AutoencoderKL.decode` computes, in packed layers.

All activations are in channels-last memory, so a 1×1 convolution is a linear layer over the pixels,
and the tokens of the attention are a view. Group norm and SiLU are one operator. The last
convolution of a residual block adds its result to the block's input, in the memory of that input.
Doubling the size and the 3×3 convolution after it are one transposed convolution (see `_Upsample`).
On x86, oneDNN reads weights in a layout of its own, and the decoder holds only that copy of them.

Shape letters: N images, H and W pixels, C channels, c latent channels, h and w latent rows and
columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_engine.vae import Attention, AutoencoderKL, Decoder, Level, ResnetBlock, Upsample
from dit_kernels import PackedLinear
from dit_kernels.dispatch import launcher
from dit_kernels.linear import onednn_takes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TYPICAL_SIDE = 32
"""oneDNN chooses the layout of the weights for this input size; inputs of any size run with it."""
FLOAT32_CHAIN = 128
"""Input channels of one float32 convolution. oneDNN adds up the products of a channels-last
convolution one after another, 9 · C_in of them. Shorter sums halve the error of a convolution of
512 channels and cost a few percent of its time."""


class LeanDecoder:
    """The decoder of ``vae`` with weights of its own, in ``dtype`` on ``device``.

    It keeps no reference to ``vae`` and does not change it. The weights take the memory of the
    decoder's parameters in ``dtype``, except that those of the upsampling convolutions take 16/9 of
    it, which is 8 % more for the whole decoder of Stable Diffusion. A call keeps no state, so
    threads may share one decoder.

    Raises ValueError for a dtype other than float32, bfloat16 and float16 (in which Stable
    Diffusion's decoder overflows).
    """

    def __init__(self, vae: AutoencoderKL, dtype: torch.dtype, device: torch.device | str) -> None:
        if dtype not in DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise ValueError(f"dtype {dtype}: choose one of {allowed}")
        self.config, self.dtype, self.device = vae.config, dtype, torch.device(device)
        with torch.no_grad():
            decoder = vae.decoder
            self._layers: list[Callable[[Tensor], Tensor]] = [
                _Pointwise(vae.post_quant_conv, dtype, self.device),
                _Conv(decoder.conv_in, dtype, self.device),
                *(_layer(module, dtype, self.device) for module in _modules(decoder)),
                _Norm(decoder.conv_norm_out, self.device).over,
                _Conv(decoder.conv_out, dtype, self.device),
            ]

    @torch.no_grad()
    def __call__(self, z: Tensor) -> Tensor:
        """The network's latents z (N, c, h, w) → float32 images (N, 3, H, W) on the device.

        In float32 on the CPU the images are decoded one by one, so that the bits of an image do not
        depend on the batch. Raises ValueError for a shape that the decoder does not take.
        """
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels or 0 in z.shape[2:]:
            raise ValueError(
                f"z has shape {tuple(z.shape)}; (N, {self.config.latent_channels}, h, w) is needed"
            )
        n, _, h, w = z.shape
        f = self.config.downsampling
        shape = (n, self.config.out_channels, f * h, f * w)
        images = torch.empty(shape, dtype=torch.float32, device=self.device)
        alone = self.device.type == "cpu" and self.dtype == torch.float32
        at_once = 1 if alone else max(n, 1)
        for part, pixels in zip(z.split(at_once), images.split(at_once), strict=True):
            if n > 0:
                x = part.to(self.device, self.dtype, memory_format=torch.channels_last)
                for layer in self._layers:
                    x = layer(x)
                pixels.copy_(x)
        return images


def _modules(decoder: Decoder) -> Iterator[nn.Module]:
    """The modules between the decoder's first convolution and its last norm, in order."""
    first, last = decoder.mid_block.resnets
    yield first
    yield from getattr(decoder.mid_block, "attentions", ())
    yield last
    for level in decoder.up_blocks:
        assert isinstance(level, Level)
        yield from level.modules_in_order()


def _layer(
    module: nn.Module, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor], Tensor]:
    if isinstance(module, ResnetBlock):
        return _Resnet(module, dtype, device)
    if isinstance(module, Attention):
        return _Attention(module, dtype, device)
    assert isinstance(module, Upsample)
    return _Upsample(module.conv, dtype, device)


class _Norm:
    """Group norm and SiLU. Weight and bias stay in float32, in which the operator computes."""

    def __init__(self, norm: nn.GroupNorm, device: torch.device) -> None:
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight = norm.weight.to(device, torch.float32, copy=True)
        self.bias = norm.bias.to(device, torch.float32, copy=True)
        self.run = launcher("groupnorm_silu", device)

    def __call__(self, x: Tensor) -> Tensor:  # (N, C, H, W) → (N, C, H, W)
        return self.run(_channels_last(x), self.groups, self.weight, self.bias, self.eps)

    def over(self, x: Tensor) -> Tensor:
        """The same, written over x if x is channels-last, as convolutions leave it."""
        x = _channels_last(x)
        return self.run(x, self.groups, self.weight, self.bias, self.eps, out=x)


class _Conv:
    """A 3×3 convolution with padding 1."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, device: torch.device) -> None:
        self.bias = _copy(conv.bias, dtype, device)
        self.packed = device.type == "cpu" and onednn_takes(dtype)
        self.width = FLOAT32_CHAIN if self.packed and dtype == torch.float32 else conv.in_channels
        self.parts = [_copy(part, dtype, device) for part in conv.weight.split(self.width, dim=1)]
        if self.packed:  # each (C_out, up to ``width``, 3, 3)
            self.parts = [
                torch.ops.mkldnn._reorder_convolution_weight(
                    part, [1, 1], [1, 1], [1, 1], 1, [1, part.shape[1], TYPICAL_SIDE, TYPICAL_SIDE]
                )
                for part in self.parts
            ]

    def __call__(self, x: Tensor) -> Tensor:  # (N, C_in, H, W) → (N, C_out, H, W)
        if not self.packed:
            return F.conv2d(x, self.parts[0], self.bias, padding=1)
        first, *rest = x.split(self.width, dim=1)
        y = torch.ops.mkldnn._convolution_pointwise(
            first, self.parts[0], self.bias, [1, 1], [1, 1], [1, 1], 1, "none", [], ""
        )
        for part, weight in zip(rest, self.parts[1:], strict=True):
            _add_convolution(y, part, weight, None)
        return y

    def add_to(self, skip: Tensor, x: Tensor) -> Tensor:
        """skip (N, C_out, H, W) + the convolution of x, written over ``skip``."""
        if not self.packed:
            return skip.add_(self(x))
        bias: Tensor | None = self.bias
        for part, weight in zip(x.split(self.width, dim=1), self.parts, strict=True):
            _add_convolution(skip, part, weight, bias)
            bias = None
        return skip


def _add_convolution(total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    torch.ops.mkldnn._convolution_pointwise_.binary(
        total, x, weight, bias, [1, 1], [1, 1], [1, 1], 1, "add", 1.0, None, [], None
    )


class _Upsample:
    """Nearest-neighbour doubling and a 3×3 convolution, as one transposed convolution of stride 2.

    Along a side, output row 2y reads the input rows y−1, y, y, and output row 2y+1 reads y, y, y+1.
    The taps that read the same row are added up beforehand. That leaves 2×2 of the 3×3 products per
    pixel, and the doubled tensor is never made. Zero padding has the same effect in both forms.
    """

    # Each row is a tap of the transposed convolution, and a 1 marks a tap that it adds up.
    SUMS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, device: torch.device) -> None:
        sums = torch.tensor(self.SUMS, dtype=torch.float64)
        # In float64, so that each sum is rounded once; (C_in, C_out, 4, 4).
        weight = torch.einsum("ka,lb,oiab->iokl", sums, sums, conv.weight.cpu().double())
        weight = _copy(weight, dtype, device)
        self.bias = _copy(conv.bias, dtype, device)
        self.packed = device.type == "cpu" and onednn_takes(dtype)
        if self.packed:
            size = [1, weight.shape[0], TYPICAL_SIDE, TYPICAL_SIDE]
            weight = torch.ops.mkldnn._reorder_convolution_transpose_weight(
                weight, [1, 1], [0, 0], [2, 2], [1, 1], 1, size
            )
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:  # (N, C, H, W) → (N, C, 2H, 2W)
        if not self.packed:
            return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)
        return torch.ops.mkldnn._convolution_transpose_pointwise(
            x, self.weight, self.bias, [1, 1], [0, 0], [2, 2], [1, 1], 1, "none", [], ""
        )


class _Pointwise:
    """A 1×1 convolution: a linear layer over the channels of each pixel."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, device: torch.device) -> None:
        weight = _copy(conv.weight.flatten(1), dtype, device)
        self.linear = PackedLinear(weight, _copy(conv.bias, dtype, device))

    def __call__(self, x: Tensor) -> Tensor:  # (N, C_in, H, W) → (N, C_out, H, W)
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Resnet:
    def __init__(self, block: ResnetBlock, dtype: torch.dtype, device: torch.device) -> None:
        self.norm1, self.norm2 = _Norm(block.norm1, device), _Norm(block.norm2, device)
        self.conv1, self.conv2 = (_Conv(c, dtype, device) for c in (block.conv1, block.conv2))
        shortcut = getattr(block, "conv_shortcut", None)
        self.shortcut = None if shortcut is None else _Pointwise(shortcut, dtype, device)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) → (N, C_out, H, W). It may write over x."""
        if self.shortcut is None:
            skip, y = x, self.norm1(x)
        else:
            skip, y = self.shortcut(x), self.norm1.over(x)
        return self.conv2.add_to(skip, self.norm2.over(self.conv1(y)))


class _Attention:
    """Single-head self-attention over the pixels, with one packed projection to q, k and v."""

    def __init__(self, module: Attention, dtype: torch.dtype, device: torch.device) -> None:
        norm, out = module.group_norm, module.to_out[0]
        assert isinstance(out, nn.Linear)
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = (_copy(p, dtype, device) for p in (norm.weight, norm.bias))
        qkv = (module.to_q, module.to_k, module.to_v)
        weight, bias = (torch.cat(p) for p in zip(*((m.weight, m.bias) for m in qkv), strict=True))
        self.qkv = PackedLinear(_copy(weight, dtype, device), _copy(bias, dtype, device))
        self.out = PackedLinear(_copy(out.weight, dtype, device), _copy(out.bias, dtype, device))

    def __call__(self, x: Tensor) -> Tensor:  # (N, C, H, W) → (N, C, H, W), written over x
        n, c, h, w = x.shape
        y = F.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        tokens = y.permute(0, 2, 3, 1).reshape(n, h * w, c)
        q, k, v = self.qkv(tokens).unsqueeze(1).chunk(3, dim=-1)  # each (N, 1, H·W, C)
        y = F.scaled_dot_product_attention(q, k, v).reshape(n, h, w, c)
        return x.add_(self.out(y).permute(0, 3, 1, 2))


def _channels_last(x: Tensor) -> Tensor:
    """x itself, unless the convolution of a library has chosen another memory format."""
    return x.contiguous(memory_format=torch.channels_last)


def _copy(tensor: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A weight in memory of its own, channels-last if it has four dimensions."""
    assert tensor is not None
    layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    return tensor.detach().to(device, dtype, copy=True, memory_format=layout)
