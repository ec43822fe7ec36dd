"""AutoencoderKL: the autoencoder of latent diffusion (Rombach et al. 2022), in plain torch.

Module names are those of diffusers and of the published Stable Diffusion files, so their
weights load as they are; ``checkpoint`` renames the older attention keys. Shape letters:
N images, H and W pixels, c latent channels, h and w latent rows and columns (H = f·h).
More than 300 lines, because encoder and decoder share their blocks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VAEConfig:
    """Shape of an AutoencoderKL and scale of its latents, in diffusers' names.

    The defaults are Stable Diffusion's. `denormalise` applies the last four; ``latents_mean`` and
    ``latents_std`` have one number for each latent channel. None has no effect.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.block_out_channels, list | tuple) or not self.block_out_channels:
            raise ValueError(
                f"block_out_channels {self.block_out_channels!r} is not a list of widths"
            )
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        for name in ("in_channels", "out_channels", "latent_channels", "layers_per_block",
                     "norm_num_groups"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} {value!r} is not a positive integer")
        for width in self.block_out_channels:
            number = isinstance(width, int) and not isinstance(width, bool)
            if not number or width <= 0 or width % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels {width!r} is not a positive multiple of "
                    f"norm_num_groups {self.norm_num_groups}"
                )
        if not isinstance(self.mid_block_add_attention, bool):
            value = self.mid_block_add_attention
            raise ValueError(f"mid_block_add_attention {value!r} is neither True nor False")
        self._check_scale()

    def _check_scale(self) -> None:
        if not _is_finite(self.scaling_factor) or self.scaling_factor <= 0:
            raise ValueError(
                f"scaling_factor {self.scaling_factor!r} is not a finite number above 0"
            )
        if self.shift_factor is not None and not _is_finite(self.shift_factor):
            raise ValueError(f"shift_factor {self.shift_factor!r} is not a finite number")
        for name in ("scaling_factor", "shift_factor"):
            if (value := getattr(self, name)) is not None:  # int or float
                object.__setattr__(self, name, float(value))
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is None:
                continue
            above = 0.0 if name == "latents_std" else -math.inf
            if (
                not isinstance(values, list | tuple)
                or len(values) != self.latent_channels
                or not all(_is_finite(value) and value > above for value in values)
            ):
                kind = "finite numbers above 0" if name == "latents_std" else "finite numbers"
                raise ValueError(
                    f"{name} {values!r} is not a list of {self.latent_channels} {kind}, "
                    "one for each latent channel"
                )
            object.__setattr__(self, name, tuple(map(float, values)))

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def denormalise(self, z: Tensor) -> Tensor:
        """The sampler's latents (N, c, h, w) → those that `AutoencoderKL.decode` takes.

        z · std / scaling_factor + mean + shift_factor, as in diffusers' pipelines: that of Stable
        Diffusion XL has ``latents_mean`` and ``latents_std``, that of Stable Diffusion 3 has
        ``shift_factor``.
        """
        if self.latents_std is not None:
            z = z * _per_channel(self.latents_std, z)
        z = z / self.scaling_factor
        if self.latents_mean is not None:
            z = z + _per_channel(self.latents_mean, z)
        return z + self.shift_factor if self.shift_factor else z

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VAEConfig:
        """Read a diffusers ``config.json``; keys that do not shape this network are dropped.

        Raises ValueError if the file describes a network that this class cannot build.
        """
        for key in ("use_quant_conv", "use_post_quant_conv"):
            if values.get(key, True) is False:
                raise ValueError(f"{key} False: only VAEs with both 1×1 convolutions are supported")
        if values.get("act_fn", "silu") != "silu":
            raise ValueError(f"act_fn {values['act_fn']!r}: only 'silu' is supported")
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in known})

    def to_json(self) -> str:
        values = {key: value for key, value in asdict(self).items() if value is not None}
        values |= {"_class_name": "AutoencoderKL", "act_fn": "silu"}
        depth = len(self.block_out_channels)
        values["down_block_types"] = ["DownEncoderBlock2D"] * depth
        values["up_block_types"] = ["UpDecoderBlock2D"] * depth
        return json.dumps(values, indent=2) + "\n"


def _is_finite(value: Any) -> bool:
    """Whether it is a real number that float32 can hold too: latents are float32."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and abs(value) <= torch.finfo(torch.float32).max


def _per_channel(values: tuple[float, ...], z: Tensor) -> Tensor:
    return torch.tensor(values, dtype=z.dtype, device=z.device).view(-1, 1, 1)


class ResnetBlock(nn.Module):
    """Twice GroupNorm, SiLU and conv, plus the input (through a 1×1 conv if the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (N, C_in, H, W) → (N, C_out, H, W)
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Single-head self-attention over the pixels of the mid block, with its own residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # diffusers: to_out.0

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) → (N, C, H, W)
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (N, H·W, C)
        q, k, v = (p(tokens).unsqueeze(1) for p in (self.to_q, self.to_k, self.to_v))
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # (N, H·W, C)
        return x + self.to_out[0](y).transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """Stride-2 convolution, padded on the right and below only (as Stable Diffusion does)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) → (N, C, H/2, W/2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) → (N, C, 2H, 2W)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, and its resampler unless it is the last level."""

    def __init__(self, widths: list[int], groups: int, resample: nn.Module | None, up: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))
        if resample is not None:
            name = "upsamplers" if up else "downsamplers"
            self.add_module(name, nn.ModuleList([resample]))

    def forward(self, x: Tensor) -> Tensor:
        for module in self.modules_in_order():
            x = module(x)
        return x

    def modules_in_order(self) -> Iterator[nn.Module]:
        for group in self.children():
            assert isinstance(group, nn.ModuleList)
            yield from group


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        if attention:
            self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) → (N, C, H, W)
        x = self.resnets[0](x)
        for attention in getattr(self, "attentions", ()):
            x = attention(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[max(i - 1, 0)]
            resample = Downsample(width) if i < len(widths) - 1 else None
            chain = [before] + [width] * config.layers_per_block
            self.down_blocks.append(Level(chain, groups, resample, up=False))
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W) → (N, 2c, h, w)
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[max(i - 1, 0)]
            resample = Upsample(width) if i < len(widths) - 1 else None
            chain = [before] + [width] * (config.layers_per_block + 1)
            self.up_blocks.append(Level(chain, groups, resample, up=True))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:  # (N, c, h, w) → (N, 3, H, W)
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Encoder to a diagonal Gaussian over latents, decoder back to pixels in [-1, 1].

    Latents here are the network's own: `VAEConfig.denormalise` makes them from the sampler's.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        c = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) in [-1, 1] → mean and log variance, each (N, c, h, w)."""
        f = self.config.downsampling
        if images.shape[-1] % f or images.shape[-2] % f:
            raise ValueError(f"image size {tuple(images.shape[-2:])} is not a multiple of {f}")
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (N, c, h, w) → images (N, 3, H, W), about [-1, 1] and not clamped."""
        return self.decoder(self.post_quant_conv(z))

    def decode_sliced(self, z: Tensor, slice_size: int = 1) -> Tensor:
        """`decode`, ``slice_size`` images at a time: the same pixels in less memory."""
        return torch.cat([self.decode(part) for part in z.split(slice_size)])

    def decode_tiled(self, z: Tensor, tile: int = 32, overlap: int = 8) -> Tensor:
        """`decode` in ``tile``-sided squares of latents that overlap by ``overlap``, blended.

        The group norms (and the mid block's attention) then see one tile each, so colours may
        differ a little from `decode`; latents no larger than a tile give the same pixels.
        """
        if not 0 <= overlap < tile:
            raise ValueError(f"overlap {overlap} is not in [0, {tile}), the tile's side")
        h, w = z.shape[-2:]
        if h <= tile and w <= tile:
            return self.decode_sliced(z)
        f = self.config.downsampling
        total = z.new_zeros(z.shape[0], self.config.out_channels, h * f, w * f)
        weight = z.new_zeros(h * f, w * f)
        for top in _tile_starts(h, tile, overlap):
            for left in _tile_starts(w, tile, overlap):
                part = self.decode_sliced(z[..., top : top + tile, left : left + tile])
                height, width = part.shape[-2:]
                ramp = _ramp(height, overlap * f).outer(_ramp(width, overlap * f)).to(part)
                rows = slice(top * f, top * f + height)
                columns = slice(left * f, left * f + width)
                total[..., rows, columns] += part * ramp
                weight[rows, columns] += ramp
        return total / weight


def _tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """First indices of tiles that cover ``size``, the last one flush with the end."""
    if size <= tile:
        return [0]
    starts = list(range(0, size - tile, tile - overlap))
    return [*starts, size - tile]


def _ramp(size: int, overlap: int) -> Tensor:
    """Blending weight over a tile's side: rises over ``overlap`` pixels, falls likewise, > 0."""
    distance = torch.arange(size, dtype=torch.float32) + 1
    edge = torch.minimum(distance, distance.flip(0))
    return (edge / max(overlap, 1)).clamp(max=1.0)
