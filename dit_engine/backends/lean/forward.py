"""The lean forward: packed weights and fused operators.

It computes `dit_engine.model.DiT.forward_conditioned` from modulations that were made before the
loop (`dit_engine.backends.lean.conditioning`). Shape letters: M rows, T tokens, D width, p patch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_engine.model import NORM_EPS, Block, DiT
from dit_kernels import PackedLinear, QuantizedLinear
from dit_kernels.checks import HEAD_DIM_LIMIT
from dit_kernels.cpu import operators as native
from dit_kernels.dispatch import chosen, implementation, launcher
from dit_kernels.quantized import Codes, Quantizer

Run = Callable[..., Any]


class Product(Protocol):
    """A linear layer that takes what a norm or an activation gives."""

    @property
    def native(self) -> bool:
        """Whether it is one call of the native library."""
        ...

    def __call__(self, h: Any, /, gelu: bool = False, out: Tensor | None = None) -> Tensor: ...


@dataclass
class LeanBlock:
    qkv: Product
    proj: Product
    fc1: Product
    fc2: Product


class LeanTransformer:
    """A DiT's weights, packed in ``dtype`` on ``device``; the model itself does not change.

    Args:
        quantized: None, or "int8" (CPU) or "fp8" (CUDA): the four linears of every block are
            then quantised, with one scale per row; the other layers stay in ``dtype``.
    """

    def __init__(
        self, model: DiT, dtype: torch.dtype, device: torch.device, quantized: str | None = None
    ) -> None:
        self.config, self.dtype, self.device = model.config, dtype, device
        self.quantized = quantized
        self.norms = _norms(device, quantized)
        usual = Parts(_attention(model, device))
        if quantized == "fp8":  # `Norms.hidden` applies the GELU, with the quantisation
            usual = replace(usual, fc1=usual.qkv)
        self.usual = usual
        self.parts: Callable[[int], Parts] = lambda rows: usual
        """Number of rows → the `Parts` that compute a forward of so many rows."""

        def packed(layer: nn.Linear) -> Product:
            if quantized is None:
                return PackedLinear(layer.weight.to(device, dtype), layer.bias.to(device, dtype))
            weight, bias = layer.weight.to(device), layer.bias.to(device)
            return _QuantizedProduct(QuantizedLinear(weight, bias, quantized, dtype))

        self.blocks: list[LeanBlock] = []
        for b in model.blocks:
            assert isinstance(b, Block)
            layers = (b.attn.qkv, b.attn.proj, b.mlp.fc1, b.mlp.fc2)
            self.blocks.append(LeanBlock(*map(packed, layers)))
        embed = model.x_embedder.proj
        assert embed.bias is not None
        # The input is narrow (p·p·C), so float32 costs next to nothing here.
        weight, bias, positions = (
            tensor.to(device, torch.float32, copy=True)
            for tensor in (embed.weight.flatten(1).t(), embed.bias, model.pos_embed[0])
        )
        self.patches = weight.contiguous(), bias, positions  # (C·p·p, D), (D,), (T, D)
        self._embed = launcher("embed", device)
        self._embeds_halves = chosen("embed", "auto", device) == "triton"
        final = model.final_layer.linear
        self.final = PackedLinear(final.weight.to(device, dtype), final.bias.to(device, dtype))
        self.rows_are_independent = self.final.rows_are_independent

    @property
    def native(self) -> bool:
        """Whether `trunk` makes only calls of the native library."""
        return self.usual.attention is native.attention and all(
            product.native
            for block in self.blocks
            for product in (block.qkv, block.proj, block.fc1, block.fc2)
        )

    def embed(self, z: Tensor, out: Tensor, counter: Tensor | None = None) -> None:
        """Latents z (N, C, S, S) → tokens (M, T, D) in ``out``. M is N, or 2·N for the same tokens
        twice. ``counter``, one int64 number on the device, is incremented."""
        z = z.float().contiguous()
        rest = *self.patches, self.config.patch_size
        if self._embeds_halves:
            self._embed(z, *rest, out=out, counter=counter)
            return
        for half in out.split(max(len(z), 1)):
            self._embed(z, *rest, out=half)
        if counter is not None:
            counter.add_(1)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Tokens x (M, T, D), overwritten, and modulations (M, 6·D·depth + 2·D) → the final
        layer's output (M, T, p·p·C_out).

        Beside x it holds at most 6·M·T·D numbers at once (norm, hidden layer, branch) and keeps
        none of them.
        """
        return self.final(self.trunk(x, modulation, Activations()))

    def trunk(self, x: Tensor, modulation: Tensor, memory: Activations) -> Tensor:
        """`forward` up to the final layer's norm (M, T, D), with its activations in ``memory``."""
        config, norms, parts = self.config, self.norms, self.parts(len(x))
        d, eps = config.hidden_size, config.mlp_norm_eps
        vectors = modulation.split(d, dim=1)  # 6 per block and 2 at the end, each (M, D)
        h = norms.first(x, vectors[0], vectors[1], NORM_EPS, memory)
        for i, block in enumerate(self.blocks):
            _, _, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors[6 * i : 6 * i + 6]
            # All activations have one name, so that each is freed as soon as the next is made.
            h = parts.qkv(block.qkv, h, out=memory.qkv)
            h = parts.attention(h, config.num_heads, out=memory.attended)
            h = norms.attended(h, memory)
            h = parts.proj(
                block.proj, h, x, (gate_msa, shift_mlp, scale_mlp, eps), norms.next, memory
            )
            h = norms.hidden(parts.fc1(block.fc1, h, out=memory.hidden), memory)
            # The end of this block with the start of the next, or of the final layer.
            shift, scale = vectors[6 * i + 6 : 6 * i + 8]
            norm = norms.next if i + 1 < len(self.blocks) else norms.last
            h = parts.fc2(block.fc2, h, x, (gate_mlp, shift, scale, NORM_EPS), norm, memory)
        return h

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(M, T, p·p·C_out) → (M, C_out, S, S)."""
        p, c = self.config.patch_size, self.config.out_channels
        side = self.config.input_size // p
        patches = tokens.view(-1, side, side, p, p, c).permute(0, 5, 1, 3, 2, 4)
        return patches.reshape(-1, c, side * p, side * p)


def product_norm(
    product: Run, h: Any, x: Tensor, vectors: tuple[Any, ...], norm: Run, memory: Activations
) -> Any:
    """The end of a branch: x += gate · product(h) in place, then the next norm; returns the norm.

    Args:
        h: (M, T, K), what ``product`` takes. x: (M, T, D), the residual.
        vectors: gate, shift and scale, each (M, D), and eps.
        norm: `Norms.next` or `Norms.last`.
    """
    return norm(x, product(h, out=memory.narrow), *vectors, memory)


@dataclass(frozen=True)
class Parts:
    """The functions that compute the five parts of every block.

    Attributes:
        attention: (packed qkv (M, T, 3·D), heads, out=) → (M, T, D).
        qkv: (product, h, out=) → (M, T, 3·D).
        fc1: (product, h, out=) → the hidden layer (M, T, 4·D), after the GELU except for "fp8".
        proj, fc2: the end of a branch, with the arguments and result of `product_norm`.
    """

    attention: Run
    qkv: Run = lambda product, h, out: product(h, out=out)
    fc1: Run = lambda product, h, out: product(h, gelu=True, out=out)
    proj: Run = product_norm
    fc2: Run = product_norm


@dataclass
class Activations:
    """Buffers for a forward's activations of M rows; what is None is allocated when it is needed.

    A product overwrites what is no longer needed: ``narrow`` holds a norm and then the result of
    a branch, and ``qkv`` and ``hidden`` may share memory.

    Attributes:
        narrow, attended: (M, T, D). qkv: (M, T, 3·D). hidden: (M, T, 4·D).
        codes, hidden_codes: of a quantised forward, with their row scales.
    """

    narrow: Tensor | None = None
    attended: Tensor | None = None
    qkv: Tensor | None = None
    hidden: Tensor | None = None
    codes: Codes | None = None
    hidden_codes: Codes | None = None


class _QuantizedProduct:
    """A `QuantizedLinear` that takes codes and scales of tokens as one argument."""

    def __init__(self, linear: QuantizedLinear) -> None:
        self.linear, self.native = linear, linear.native

    def __call__(self, h: Codes, /, gelu: bool = False, out: Tensor | None = None) -> Tensor:
        rows = None if out is None else out.flatten(0, 1)
        return self.linear(*h, gelu=gelu, out=rows).view(*h[1].shape, -1)


def _attention(model: DiT, device: torch.device) -> Run:
    """(packed qkv (M, T, 3·D), heads, out=) → (M, T, D)."""
    config = model.config
    d = config.hidden_size // config.num_heads
    fused = launcher("attention", device)
    if d % 8 == 0 and d <= HEAD_DIM_LIMIT and implementation("attention", "auto", device) is fused:
        return fused

    def by_torch(qkv: Tensor, num_heads: int, out: Tensor | None = None) -> Tensor:
        q, k, v = qkv.unflatten(2, (3, num_heads, d)).permute(2, 0, 3, 1, 4)
        made = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return made if out is None else out.copy_(made)

    return by_torch


@dataclass
class Norms:
    """adaLN between the products. Each function returns what the next product takes: the modulated
    norm, or for quantised products its codes and row scales.

    Attributes:
        first: (x, shift, scale, eps, memory), before the first block.
        next: (x, y, gate, shift, scale, eps, memory) after a branch with result y; x += gate · y in
            place.
        last: as next, before the final layer: never quantised.
        attended: (h, memory), for the result of attention.
        hidden: (h, memory), for the hidden layer; for "fp8" it also applies the GELU.
    """

    first: Run
    next: Run
    last: Run
    attended: Run
    hidden: Run


def _norms(device: torch.device, quantized: str | None) -> Norms:
    norm = launcher("layernorm_modulate", device)
    gated = launcher("gate_residual_layernorm_modulate", device)

    def last(x: Tensor, y: Tensor, *given: Any) -> Tensor:
        # Each row of y is read before it is written, so the norm can overwrite y.
        gated(x, y, *given[:-1], out=(x, y))
        return y

    if quantized is None:
        return Norms(
            first=lambda *given: norm(*given[:-1], out=given[-1].narrow),
            next=last,
            last=last,
            attended=lambda h, memory: h,
            hidden=lambda h, memory: h,
        )
    quantize = Quantizer(quantized, device)
    hidden = quantize.gelu_rows if quantized == "fp8" else quantize.rows
    return Norms(
        first=lambda *given: quantize.norm(*given[:-1], out=given[-1].codes),
        next=lambda *given: quantize.gated_norm(*given[:-1], out=given[-1].codes),
        last=last,
        attended=lambda h, memory: quantize.rows(h, out=memory.codes),
        hidden=lambda h, memory: hidden(h, out=memory.hidden_codes),
    )
