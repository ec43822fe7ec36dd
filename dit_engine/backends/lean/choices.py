"""Chooses by measurement which kernels compute the products and the attention on CUDA.

For each of its parts (`dit_engine.backends.lean.forward.Parts`) a forward of M rows uses the
fastest of the `candidates` on its device. `dit_engine.backends.lean.choice_file` stores the times.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dit_engine.backends.lean.choice_file import ChoiceFile
from dit_engine.backends.lean.forward import (
    Activations,
    LeanTransformer,
    Parts,
    Run,
    product_norm,
)
from dit_kernels import PackedLinear
from dit_kernels.checks import HEAD_DIM_LIMIT
from dit_kernels.chooser import Chooser, choosing, cuda_sample
from dit_kernels.dispatch import attention_candidates, implementation, why_not

CORES = os.cpu_count() or 1


def by_measurement(transformer: LeanTransformer) -> Callable[[int], Parts]:
    """The function for `LeanTransformer.parts` on CUDA: `ChosenParts` with the file of the device,
    or the transformer's own function if there is nothing to choose or choosing is turned off.

    Raises ValueError for a `dit_kernels.chooser.VARIABLE` that is neither 0 nor 1.
    """
    if not choosing() or not candidates(transformer, 1):
        return transformer.parts
    file, device = ChoiceFile(transformer.device), transformer.device
    return ChosenParts(transformer, Chooser(file.recall, file.remember, cuda_sample(device)))


class ChosenParts:
    """Number of rows → `Parts`, chosen at the first call for this number. Threads may share it.

    Every forward asks here, so forwards with the same number of rows use the same parts, inside and
    outside of graphs.
    """

    def __init__(self, transformer: LeanTransformer, chooser: Chooser) -> None:
        # A weak reference, because the transformer holds this object: its weights must be freed at
        # once, not by a later garbage collection.
        self.transformer, self.chooser = weakref.proxy(transformer), chooser
        self._chosen: dict[int, Parts] = {}
        self._lock = threading.Lock()

    def __call__(self, rows: int) -> Parts:
        if (known := self._chosen.get(rows)) is not None:
            return known  # without the lock: a capture must not wait for another measurement
        with self._lock:
            if rows not in self._chosen:
                try:
                    self._chosen[rows] = self._choose(rows)
                except torch.OutOfMemoryError:
                    warnings.warn(
                        f"too little memory to measure a forward of {rows} rows, which may be "
                        "slower than it could be",
                        stacklevel=2,
                    )
                    self._chosen[rows] = self.transformer.usual
            return self._chosen[rows]

    def _choose(self, rows: int) -> Parts:
        found, chosen = candidates(self.transformer, rows), dict[str, Run]()
        self._compile(rows, found)
        for part, ways in found.items():
            # The example is made at the first call, and never if the choice is already stored.
            example = functools.cache(functools.partial(Example, self.transformer, part, rows))
            calls = {name: lambda e=example, way=way: e().call(way) for name, way in ways.items()}
            key = _key(self.transformer, part, rows)
            with torch.inference_mode():
                name = self.chooser.choose(key, calls, lambda e=example: e().reset())
            chosen[part] = ways[name]
        return replace(self.transformer.usual, **chosen)

    def _compile(self, rows: int, found: Mapping[str, Mapping[str, Run]]) -> None:
        """Compile all candidates that will be measured, on all cores, because each takes about a
        second. Errors are ignored here: they occur again when the candidate is measured."""
        from dit_kernels.triton.compiling import only_compiling

        named = {part: _key(self.transformer, part, rows) for part in found}
        parts = [part for part in found if self.chooser.measures(named[part], found[part])]
        if not parts:
            return
        device = self.transformer.device
        with suppress(Exception), torch.inference_mode(), only_compiling(CORES, device):
            for part in parts:
                example = Example(self.transformer, part, rows)
                for way in found[part].values():
                    with suppress(Exception):
                        example.call(way)


def _key(transformer: LeanTransformer, part: str, rows: int) -> str:
    config, dtype = transformer.config, str(transformer.dtype).removeprefix("torch.")
    inputs, outputs = _widths(transformer, part)
    heads = f", {config.num_heads} heads" if part == "attention" else ""
    return f"{part} {rows}x{config.num_tokens}x{inputs} to {outputs}{heads}, {dtype}"


def _widths(transformer: LeanTransformer, part: str) -> tuple[int, int]:
    d, hidden = transformer.config.hidden_size, transformer.config.mlp_hidden_size
    return {"qkv": (d, 3 * d), "attention": (3 * d, d), "proj": (d, d), "fc1": (d, hidden),
            "fc2": (hidden, d)}[part]  # fmt: skip


def candidates(transformer: LeanTransformer, rows: int) -> dict[str, dict[str, Run]]:
    """Part of a forward of ``rows`` rows → name → function, the default first. A part that is not
    in the result has only its default."""
    dtype, device, config = transformer.dtype, transformer.device, transformer.config
    if dtype == torch.float32 or rows == 0 or why_not("triton", "attention", device) is not None:
        return {}
    found: dict[str, dict[str, Run]] = {}
    heads, d = config.num_heads, config.hidden_size // config.num_heads
    if d % 8 == 0 and d <= HEAD_DIM_LIMIT:
        shape = rows, config.num_tokens, heads, d
        found["attention"] = attention_candidates(*shape, dtype, device)
    if transformer.quantized is None:
        for part in ("qkv", "proj", "fc1", "fc2"):
            found[part] = _products(transformer, part, rows)
    return found


def _products(transformer: LeanTransformer, part: str, rows: int) -> dict[str, Run]:
    """Name → product of ``part``: cuBLASLt's ("library") and ours in several tilings. For "proj"
    and "fc2" the function also computes the norm after the product."""
    from dit_kernels.triton import product as own
    from dit_kernels.triton.attention import device_facts

    end = part in ("proj", "fc2")
    found: dict[str, Run] = {"library": getattr(transformer.usual, part)}
    layer = getattr(transformer.blocks[0], part)
    x = torch.empty(0, layer.in_features, dtype=layer.dtype, device=transformer.device)
    if own.why_not(x, layer.weight) is not None:
        return found
    norm, gated = (
        implementation(name, "triton", transformer.device)
        for name in ("layernorm_modulate", "gate_residual_layernorm_modulate")
    )

    def product(
        tiles: Any, layer: PackedLinear, h: Tensor, gelu: bool = False, out: Tensor | None = None
    ) -> Tensor:
        return own.product(h, layer.weight, layer.bias, tiles, gelu=gelu, out=out)

    def then_norm(tiles: Any, layer: PackedLinear, *given: Any) -> Tensor:
        return product_norm(functools.partial(product, tiles, layer), *given)

    def with_residual(
        tiles: Any, layer: PackedLinear, h: Tensor, x: Tensor, vectors: tuple[Any, ...],
        _: Run, memory: Activations,
    ) -> Tensor:  # fmt: skip
        gate, shift, scale, eps = vectors
        own.product_gate_residual(h, layer.weight, layer.bias, gate, x, tiles)
        return norm(x, shift, scale, eps, out=memory.narrow)

    def partial_sums(
        tiles: Any, layer: PackedLinear, h: Tensor, x: Tensor, vectors: tuple[Any, ...],
        _: Run, memory: Activations,
    ) -> Tensor:  # fmt: skip
        sums = own.product_partial_sums(h, layer.weight, tiles)
        out = x, torch.empty_like(x) if memory.narrow is None else memory.narrow
        return gated(x, sums, *vectors, out=out, bias=layer.bias)[1]

    processors = device_facts(transformer.device)[1]
    tokens = rows * transformer.config.num_tokens
    for name, tiles in own.candidates(tokens, *_widths(transformer, part), processors).items():
        ways: dict[str, Run] = {}
        if tiles.splits > 1:
            ways = {name: partial_sums} if end else {}
        elif end:
            ways = {name: then_norm, f"{name} with residual": with_residual}
        else:
            ways = {name: functools.partial(product, gelu=part == "fc1")}
        found |= {each: functools.partial(way, tiles) for each, way in ways.items()}
    return found


class Example:
    """Calls one part of the first block with random activations."""

    def __init__(self, transformer: LeanTransformer, part: str, rows: int) -> None:
        config, self.transformer, self.part = transformer.config, transformer, part
        draw = torch.Generator(transformer.device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            like: dict[str, Any] = {"dtype": transformer.dtype, "device": transformer.device}
            return torch.randn(shape, generator=draw, **like)

        d = config.hidden_size
        self.h = random(rows, config.num_tokens, _widths(transformer, part)[0])
        self.product: Any = getattr(transformer.blocks[0], part, None)
        if part in ("proj", "fc2"):
            # The residual is as large as the branch, so that errors in either of them show.
            size = self.product(self.h).float().square().mean().sqrt().item()
            self.before = random(rows, config.num_tokens, d) * size
            self.x = torch.empty_like(self.before)
            self.vectors = *random(rows, 6 * d).split(d, dim=1)[:3], config.mlp_norm_eps

    def reset(self) -> None:
        if self.part in ("proj", "fc2"):
            self.x.copy_(self.before)

    def call(self, way: Run) -> Any:
        if self.part == "attention":
            return way(self.h, self.transformer.config.num_heads, out=None)
        if self.part in ("qkv", "fc1"):
            return way(self.product, self.h, out=None)
        norm = self.transformer.norms.next
        return self.x, way(self.product, self.h, self.x, self.vectors, norm, Activations())
