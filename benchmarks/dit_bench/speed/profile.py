"""Where the lean forward's time goes: each of its operators alone, in sequence, weights cold.

Every part runs its operator once per block with that block's own weights, so that a block's weights
have left the caches when it is its turn again (DiT-XL/2's are 900 MB in bf16; small models stay in
the caches, here as in the forward). What the whole forward takes beyond the sum of its parts is
"rest": calls, allocations, patches, and the cache that one operator leaves to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_bench.report import Row
from dit_bench.speed.latency import Timer
from dit_bench.timing import interleave, spread
from dit_engine.backends.lean.forward import Activations, LeanTransformer, Product
from dit_engine.model import NORM_EPS

Part = Callable[[], object]


class Linears:
    """The block linears and the final one of the lean forward, with inputs of their own.

    Inputs of quantised linears are quantised beforehand.
    """

    def __init__(self, lean: LeanTransformer, batch: int) -> None:
        config = lean.config
        self.blocks = lean.blocks
        generator = torch.Generator().manual_seed(2)

        def tokens(width: int) -> Tensor:
            shape = (batch, config.num_tokens, width)
            return torch.randn(shape, generator=generator).to(lean.dtype)

        self.last = tokens(config.hidden_size)
        self.narrow = lean.norms.attended(self.last, Activations())
        self.wide = lean.norms.hidden(tokens(config.mlp_hidden_size), Activations())
        self.final = lean.final

    def all(self) -> Tensor:
        """In the order of the forward, nothing else between: the denominator of the bar."""
        for block in self.blocks:
            block.qkv(self.narrow)
            block.proj(self.narrow)
            block.fc1(self.narrow)
            block.fc2(self.wide)
        return self.final(self.last)


def forward_parts(lean: LeanTransformer, batch: int) -> dict[str, Part]:
    """Operator → a function that runs all of a forward's calls to it."""
    config, norms = lean.config, lean.norms
    depth, d, eps = config.depth, config.hidden_size, config.mlp_norm_eps
    linears = Linears(lean, batch)
    generator = torch.Generator().manual_seed(3)

    def tokens(width: int) -> Tensor:
        shape = (batch, config.num_tokens, width)
        return torch.randn(shape, generator=generator).to(lean.dtype)

    # One qkv a block: as in the forward, it comes from the shared cache at best.
    packed = [tokens(3 * d) for _ in range(depth)]
    attended, hidden = tokens(d), tokens(config.mlp_hidden_size)
    x, y = tokens(d), tokens(d)
    row = torch.randn(batch, 6 * d * depth + 2 * d, generator=generator).to(lean.dtype)
    vectors = row.split(d, dim=1)  # 6 a block and 2 at the end, each (batch, D)

    def through(name: str, h: Any, gelu: bool = False) -> Part:
        layers: Sequence[Product] = [getattr(block, name) for block in lean.blocks]

        def run() -> None:
            for layer in layers:
                layer(h, gelu=gelu)

        return run

    def attend() -> None:
        for qkv in packed:
            lean.attention(qkv, config.num_heads)

    def norm_rows() -> None:
        memory = Activations()
        norms.first(x, vectors[0], vectors[1], NORM_EPS, memory)
        for i in range(depth):
            _, _, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors[6 * i : 6 * i + 6]
            shift, scale = vectors[6 * i + 6 : 6 * i + 8]
            norms.attended(attended, memory)
            norms.next(x, y, gate_msa, shift_mlp, scale_mlp, eps, memory)
            norms.hidden(hidden, memory)
            if i + 1 < depth:
                norms.next(x, y, gate_mlp, shift, scale, NORM_EPS, memory)
            else:
                norms.last(x, y, gate_mlp, shift, scale, NORM_EPS)

    return {
        "qkv": through("qkv", linears.narrow),
        "attention": attend,
        "proj": through("proj", linears.narrow),
        "fc1": through("fc1", linears.narrow),
        "fc1 + gelu": through("fc1", linears.narrow, gelu=True),
        "fc2": through("fc2", linears.wide),
        "row kernels": norm_rows,
        "final linear": lambda: lean.final(linears.last),
    }


def profile_row(
    forward: Part, lean: LeanTransformer, batch: int, precision: str, timer: Timer
) -> Row:
    """Each operator of the lean forward alone, and the forward itself, interleaved."""
    with torch.inference_mode():
        functions: dict[str, Part] = {"forward": forward, **forward_parts(lean, batch)}
        for function in functions.values():
            function()
        with timer.load.sampled():
            samples = interleave(functions, timer.rounds)
    medians = {part: spread(samples[part]).median for part in functions}
    split = shares(medians, medians.pop("forward"))
    return {
        "status": "ok", "precision": precision, "ms": vars(spread(samples["forward"])),
        "operators_ms": medians,
        "shares": [{"part": part, "ms": ms, "share": share} for part, ms, share in split],
    }  # fmt: skip


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
