"""The layers of the fast decoder of a VAE, each for the CPU and for a GPU.

All activations are in channels-last memory, so a 1×1 convolution is a linear layer over the pixels,
and the tokens of the attention are a view. Group norm and SiLU are one operator. Doubling the size
and the 3×3 convolution after it are one transposed convolution (see `UpsampleConv`).

On the CPU, oneDNN adds a convolution's bias to its result, and adds the result of a residual
block's last convolution to the block's input. On x86 oneDNN has its own layout of weights, and the
decoder holds only that copy of them.

On a GPU each of these sums would need another pass over memory, so the next norm adds them. A layer
returns x and ``add``, a tensor that is still to be added to x, or None. Its attribute ``shift`` is
a constant per channel that is also still to be added, or None.

Shape letters: N images, H and W pixels, C channels.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_engine.vae import Attention, ResnetBlock, Upsample
from dit_kernels import PackedLinear
from dit_kernels.dispatch import launcher
from dit_kernels.linear import onednn_takes

TYPICAL_SIDE = 32
"""oneDNN chooses the layout of the weights for this input size; inputs of any size run with it."""
LARGEST_SCORES = 4096
"""Up to this number of tokens a GPU holds the attention's scores in memory: 67 MB per image."""
FLOAT32_CHAIN = 128
"""A float32 convolution with more input channels than this is split on the CPU. oneDNN adds up the
9 · C_in products of a channels-last convolution one after another. With shorter sums, a convolution
of 512 channels has half the error and takes a few percent longer."""


def layer_of(
    module: nn.Module, shift: Tensor | None, dtype: torch.dtype, device: torch.device
) -> LeanResnet | LeanAttention | UpsampleConv:
    """The fast layer for a module of the decoder; ``shift`` is that of the layer before."""
    if isinstance(module, ResnetBlock):
        return LeanResnet(module, shift, dtype, device)
    if isinstance(module, Attention):
        return LeanAttention(module, shift, dtype, device)
    assert isinstance(module, Upsample)
    return UpsampleConv(module.conv, shift, dtype, device)


def leaves_sums(device: torch.device) -> bool:
    """Whether the next norm adds a convolution's bias and a residual block's sum."""
    return device.type != "cpu"


class Norm:
    """Group norm and SiLU of x + ``add`` + ``shift``. The operator computes in float32, so weight
    and bias stay in float32."""

    def __init__(
        self, norm: nn.GroupNorm, device: torch.device, shift: Tensor | None, silu: bool = True
    ) -> None:
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight = norm.weight.to(device, torch.float32, copy=True)
        self.bias = norm.bias.to(device, torch.float32, copy=True)
        run = launcher("groupnorm_silu", device)
        self.run = partial(run, shift=shift, silu=silu) if leaves_sums(device) else run

    def __call__(self, x: Tensor, add: Tensor | None = None, over: bool = False) -> Tensor:
        """x (N, C, H, W) → the same shape. ``add`` is added to x in place. over: overwrite x with
        the result."""
        options = {} if add is None else {"add": add}
        out = x if over else None
        return self.run(x, self.groups, self.weight, self.bias, self.eps, out=out, **options)


class Conv:
    """A 3×3 convolution with padding 1.

    Attributes:
        shift: its bias (C_out,) in float32 if the next norm adds it, otherwise None.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, device: torch.device) -> None:
        self.bias, self.shift = _bias(conv, dtype, device)
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
            return _channels_last(F.conv2d(x, self.parts[0], self.bias, padding=1))
        first, *rest = x.split(self.width, dim=1)
        y = torch.ops.mkldnn._convolution_pointwise(
            first, self.parts[0], self.bias, [1, 1], [1, 1], [1, 1], 1, "none", [], ""
        )
        for part, weight in zip(rest, self.parts[1:], strict=True):
            _add_convolution(y, part, weight, None)
        return _channels_last(y)

    def add_to(self, skip: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The sum of skip (N, C_out, H, W) and the convolution of x: (sum, None), written over
        ``skip``, or (skip, the convolution) if the next norm adds them."""
        if self.shift is not None:
            return skip, self(x)
        if not self.packed:
            return skip.add_(self(x)), None
        bias = self.bias
        for part, weight in zip(x.split(self.width, dim=1), self.parts, strict=True):
            _add_convolution(skip, part, weight, bias)
            bias = None
        return skip, None


def _add_convolution(total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    torch.ops.mkldnn._convolution_pointwise_.binary(
        total, x, weight, bias, [1, 1], [1, 1], [1, 1], 1, "add", 1.0, None, [], None
    )


class UpsampleConv:
    """Nearest-neighbour doubling and a 3×3 convolution, as one transposed convolution of stride 2.

    Along a side, output row 2y reads the input rows y−1, y, y, and output row 2y+1 reads y, y, y+1.
    The taps that read the same row are added up beforehand. That leaves 2×2 of the 3×3 products per
    pixel, and the doubled tensor is never made. Zero padding has the same effect in both forms.
    """

    # A row is a tap of the transposed convolution; the 1s mark the 3×3 taps that it adds up.
    SUMS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))

    def __init__(
        self, conv: nn.Conv2d, shift: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        sums = torch.tensor(self.SUMS, dtype=torch.float64)
        # In float64, so that each sum is rounded once; (C_in, C_out, 4, 4).
        weight = torch.einsum("ka,lb,oiab->iokl", sums, sums, conv.weight.cpu().double())
        weight = _copy(weight, dtype, device)
        self.before = shift
        if shift is not None:
            self.add = launcher("add_shift", device)
        self.bias, self.shift = _bias(conv, dtype, device)
        self.packed = device.type == "cpu" and onednn_takes(dtype)
        if self.packed:
            size = [1, weight.shape[0], TYPICAL_SIDE, TYPICAL_SIDE]
            weight = torch.ops.mkldnn._reorder_convolution_transpose_weight(
                weight, [1, 1], [0, 0], [2, 2], [1, 1], 1, size
            )
        self.weight = weight

    def __call__(self, x: Tensor, add: Tensor | None) -> tuple[Tensor, None]:
        """x (N, C, H, W) → (N, C, 2H, 2W); x may be overwritten."""
        # ``shift`` must be added here, because the padding of this convolution is 0.
        if self.before is not None:
            assert add is not None, "a residual block comes before"
            x = self.add(x, add, self.before)
        if self.packed:
            y = torch.ops.mkldnn._convolution_transpose_pointwise(
                x, self.weight, self.bias, [1, 1], [0, 0], [2, 2], [1, 1], 1, "none", [], ""
            )
        else:
            y = F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)
        return _channels_last(y), None


class Pointwise:
    """A 1×1 convolution of x + ``shift``, as a linear layer over the channels of each pixel."""

    def __init__(
        self, conv: nn.Conv2d, dtype: torch.dtype, device: torch.device, shift: Tensor | None = None
    ) -> None:
        weight, bias = conv.weight.flatten(1), conv.bias
        assert bias is not None
        if shift is not None:
            bias = bias.to(shift) + (weight.to(shift) * shift).sum(1)
        self.linear = PackedLinear(_copy(weight, dtype, device), _copy(bias, dtype, device))

    def __call__(self, x: Tensor) -> Tensor:  # (N, C_in, H, W) → (N, C_out, H, W)
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LeanResnet:
    """A residual block: (x, add) → (x, add), see the module."""

    def __init__(
        self, block: ResnetBlock, shift: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.conv1, self.conv2 = (Conv(c, dtype, device) for c in (block.conv1, block.conv2))
        self.norm1 = Norm(block.norm1, device, shift)
        self.norm2 = Norm(block.norm2, device, self.conv1.shift)
        self.shift, shortcut = self.conv2.shift, getattr(block, "conv_shortcut", None)
        if shortcut is not None:
            self.shortcut = Pointwise(shortcut, dtype, device, shift)
        else:
            self.shortcut = None
            if shift is not None and self.shift is not None:
                self.shift = shift + self.shift

    def __call__(self, x: Tensor, add: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x (N, C_in, H, W) → (N, C_out, H, W); x may be overwritten."""
        if self.shortcut is not None and add is None:
            skip, y = self.shortcut(x), self.norm1(x, over=True)
        else:
            y = self.norm1(x, add)
            skip = x if self.shortcut is None else self.shortcut(x)
        return self.conv2.add_to(skip, self.norm2(self.conv1(y), over=True))


class LeanAttention:
    """Single-head self-attention over the pixels, with one packed projection to q, k and v.

    A head of 512 dimensions does not fit into the registers of a fused GPU kernel. With only one
    head, such a kernel would also use few multiprocessors. On a GPU, two matrix products with the
    scores in memory use all of them.
    """

    def __init__(
        self, module: Attention, shift: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shift, norm, out = shift, module.group_norm, module.to_out[0]
        assert isinstance(out, nn.Linear)
        self.softmax = launcher("softmax", device) if leaves_sums(device) else None
        if shift is not None:
            self.norm = Norm(norm, device, shift, silu=False)
        else:
            affine = (_copy(p, dtype, device) for p in (norm.weight, norm.bias))
            self.norm = partial(_group_norm, norm.num_groups, norm.eps, *affine)
        qkv = (module.to_q, module.to_k, module.to_v)
        weight, bias = (torch.cat(p) for p in zip(*((m.weight, m.bias) for m in qkv), strict=True))
        self.qkv = PackedLinear(_copy(weight, dtype, device), _copy(bias, dtype, device))
        self.out = PackedLinear(_copy(out.weight, dtype, device), _copy(out.bias, dtype, device))

    def __call__(self, x: Tensor, add: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x (N, C, H, W) → the same shape; x is overwritten."""
        n, c, h, w = x.shape
        tokens = self.norm(x, add).permute(0, 2, 3, 1).reshape(n, h * w, c)
        qkv = self.qkv(tokens)  # (N, H·W, 3·C)
        if self.softmax is None or h * w > LARGEST_SCORES:
            q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            q, k, v = qkv.chunk(3, dim=-1)
            y = torch.bmm(self.softmax(_scores(q, k), c**-0.5, v.dtype), v)
        y = self.out(y.reshape(n, h, w, c)).permute(0, 3, 1, 2)
        return (x.add_(y), None) if self.shift is None else (x, y)


Layer = LeanResnet | LeanAttention | UpsampleConv


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q · kᵀ in float32, (N, T, T)."""
    if q.dtype == torch.float32 or q.device.type in ("cpu", "mps", "xpu"):  # bmm has no out_dtype
        return torch.bmm(q.float(), k.float().mT)
    return torch.bmm(q, k.mT, out_dtype=torch.float32)


def _group_norm(
    groups: int, eps: float, weight: Tensor, bias: Tensor, x: Tensor, add: None
) -> Tensor:
    return F.group_norm(x, groups, weight, bias, eps)


def _bias(
    conv: nn.Conv2d, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """(the bias for the library's convolution, the bias that the next norm adds); one is None."""
    if leaves_sums(device):
        return None, _copy(conv.bias, torch.float32, device)
    return _copy(conv.bias, dtype, device), None


def _channels_last(x: Tensor) -> Tensor:
    """x in channels-last memory. This copies only if a convolution chose another format."""
    return x.contiguous(memory_format=torch.channels_last)


def _copy(tensor: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy of a weight, in channels-last memory if it has four dimensions."""
    assert tensor is not None
    layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    return tensor.detach().to(device, dtype, copy=True, memory_format=layout)
