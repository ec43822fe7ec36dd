"""Where the lean forward's time goes: each of its operators alone, in sequence, weights cold.

Every part runs its operator once a block with that block's own weights, so that a block's weights
have left the caches when it is its turn again (DiT-XL/2's are 900 MB in bf16; small models stay in
the caches, here as in the forward). What the whole forward takes beyond the sum of its parts is
"rest": calls, allocations, patches, and the cache that one operator leaves to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dit_engine.model import NORM_EPS, DiT
from dit_kernels import (
    PackedLinear,
    attention,
    gate_residual_layernorm_modulate,
    layernorm_modulate,
)

Part = Callable[[], object]


class Linears:
    """The block linears and the final one, packed as lean packs them, with inputs of their own."""

    def __init__(self, model: DiT, batch: int, dtype: torch.dtype) -> None:
        config = model.config
        self.dtype = dtype

        def packed(name: str) -> PackedLinear:
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            return PackedLinear(layer.weight.to(dtype), layer.bias.to(dtype))

        blocks = [f"blocks.{i}" for i in range(config.depth)]
        self.qkv = [packed(f"{block}.attn.qkv") for block in blocks]
        self.proj = [packed(f"{block}.attn.proj") for block in blocks]
        self.fc1 = [packed(f"{block}.mlp.fc1") for block in blocks]
        self.fc2 = [packed(f"{block}.mlp.fc2") for block in blocks]
        self.final = packed("final_layer.linear")
        generator = torch.Generator().manual_seed(2)
        shape = (batch, config.num_tokens)
        widths = (config.hidden_size, config.mlp_hidden_size)
        self.narrow, self.wide = (
            torch.randn(*shape, width, generator=generator).to(dtype) for width in widths
        )

    def all(self) -> Tensor:
        """In the order of the forward, nothing else between: the denominator of the bar."""
        for qkv, proj, fc1, fc2 in zip(self.qkv, self.proj, self.fc1, self.fc2, strict=True):
            qkv(self.narrow)
            proj(self.narrow)
            fc1(self.narrow)
            fc2(self.wide)
        return self.final(self.narrow)


def forward_parts(model: DiT, batch: int, dtype: torch.dtype) -> dict[str, Part]:
    """Operator → a function that runs all of a forward's calls to it."""
    config = model.config
    depth, d, eps = config.depth, config.hidden_size, config.mlp_norm_eps
    linears = Linears(model, batch, dtype)
    generator = torch.Generator().manual_seed(3)
    tokens = (batch, config.num_tokens)
    # One qkv a block: as in the forward, it comes from the shared cache at best.
    packed = [torch.randn(*tokens, 3 * d, generator=generator).to(dtype) for _ in range(depth)]
    x, y = (torch.randn(*tokens, d, generator=generator).to(dtype) for _ in range(2))
    row = torch.randn(batch, 6 * d * depth + 2 * d, generator=generator).to(dtype)
    vectors = row.split(d, dim=1)  # 6 a block and 2 at the end, each (batch, D)

    def through(layers: Sequence[PackedLinear], h: Tensor, gelu: bool = False) -> Part:
        def run() -> None:
            for layer in layers:
                layer(h, gelu=gelu)

        return run

    def attend() -> None:
        for qkv in packed:
            attention(qkv, config.num_heads)

    def norm_rows() -> None:
        layernorm_modulate(x, vectors[0], vectors[1], NORM_EPS)
        for i in range(depth):
            _, _, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors[6 * i : 6 * i + 6]
            shift, scale = vectors[6 * i + 6 : 6 * i + 8]
            gate_residual_layernorm_modulate(x, y, gate_msa, shift_mlp, scale_mlp, eps)
            gate_residual_layernorm_modulate(x, y, gate_mlp, shift, scale, NORM_EPS)

    return {
        "qkv": through(linears.qkv, linears.narrow),
        "attention": attend,
        "proj": through(linears.proj, linears.narrow),
        "fc1": through(linears.fc1, linears.narrow),
        "fc1 + gelu": through(linears.fc1, linears.narrow, gelu=True),
        "fc2": through(linears.fc2, linears.wide),
        "row kernels": norm_rows,
        "final linear": through([linears.final], linears.narrow),
    }


def shares(parts_ms: dict[str, float], forward_ms: float) -> list[tuple[str, float, float]]:
    """(part, ms, share of the forward) down to "rest"; "fc1 + gelu" is split into its two.

    The split is a difference of two measurements and may come out below zero.
    """
    if forward_ms <= 0:
        raise ValueError(f"forward {forward_ms} ms is not above 0")
    split = {
        "linears": sum(parts_ms[name] for name in ("qkv", "proj", "fc1", "fc2", "final linear")),
        "gelu": parts_ms["fc1 + gelu"] - parts_ms["fc1"],
        "attention": parts_ms["attention"],
        "row kernels": parts_ms["row kernels"],
    }
    split["rest"] = forward_ms - sum(split.values())
    return [(name, ms, ms / forward_ms) for name, ms in split.items()]
