"""Where the lean forward's time goes: each of its operators alone, in sequence, weights cold; and,
on a GPU, every kernel of one step, see `kernel_row`.

Every part runs its operator once per block with that block's own weights, so that a block's weights
have left the caches when it is its turn again (DiT-XL/2's are 900 MB in bf16; small models stay in
the caches, here as in the forward). "rest" is the time of the whole forward minus the sum of its
parts: calls, allocations, patches, and the effect of one operator's caches on the next.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_bench.report import Row
from dit_bench.speed.forward import CHANNELS, SCALE, Work
from dit_bench.speed.latency import Timer
from dit_bench.timing import interleave, spread
from dit_engine.backends.lean.forward import Activations, LeanTransformer
from dit_engine.model import NORM_EPS
from dit_engine.sampling.coefficients import step_coefficients

Part = Callable[[], object]


def linear_inputs(lean: LeanTransformer, batch: int) -> tuple[Any, Any, Tensor]:
    """The inputs of a block's linears, of width D and of the hidden layer's width, quantised if the
    linears are; and the input of the final linear."""
    config, draw = lean.config, torch.Generator().manual_seed(2)
    narrow, wide = (
        torch.randn(batch, config.num_tokens, width, generator=draw).to(lean.dtype)
        for width in (config.hidden_size, config.mlp_hidden_size)
    )
    attended = lean.norms.attended(narrow, Activations())
    return attended, lean.norms.hidden(wide, Activations()), narrow


def linears_alone(lean: LeanTransformer, batch: int) -> Callable[[], Tensor]:
    """The linears of the blocks and the final one, in the forward's order, with nothing between."""
    narrow, wide, last = linear_inputs(lean, batch)

    def run() -> Tensor:
        for block in lean.blocks:
            block.qkv(narrow)
            block.proj(narrow)
            block.fc1(narrow)
            block.fc2(wide)
        return lean.final(last)

    return run


def forward_parts(lean: LeanTransformer, batch: int) -> dict[str, Part]:
    """Operator → a function that runs all of a forward's calls to it."""
    config, norms, memory = lean.config, lean.norms, Activations()
    depth, t, d, eps = config.depth, config.num_tokens, config.hidden_size, config.mlp_norm_eps
    draw = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=draw).to(lean.dtype)

    narrow, wide, last = linear_inputs(lean, batch)
    # One qkv per block, so that, as in the forward, it is not in a core's own cache.
    packed = [drawn(t, 3 * d) for _ in range(depth)]
    attended, hidden, x, y = drawn(t, d), drawn(t, config.mlp_hidden_size), drawn(t, d), drawn(t, d)
    vectors = drawn(6 * d * depth + 2 * d).split(d, dim=1)  # 6 per block, 2 at the end, (N, D)

    def through(name: str, h: Any, gelu: bool = False) -> Part:
        layers = [getattr(block, name) for block in lean.blocks]

        def run() -> None:
            for layer in layers:
                layer(h, gelu=gelu)

        return run

    def attend() -> None:
        attention = lean.parts(batch).attention
        for qkv in packed:
            attention(qkv, config.num_heads)

    def norm_rows() -> None:
        norms.first(x, vectors[0], vectors[1], NORM_EPS, memory)
        for i in range(depth):
            _, _, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors[6 * i : 6 * i + 6]
            shift, scale = vectors[6 * i + 6 : 6 * i + 8]
            norms.attended(attended, memory)
            norms.next(x, y, gate_msa, shift_mlp, scale_mlp, eps, memory)
            norms.hidden(hidden, memory)
            norm = norms.next if i + 1 < depth else norms.last
            norm(x, y, gate_mlp, shift, scale, NORM_EPS, memory)

    return {
        "qkv": through("qkv", narrow), "attention": attend, "proj": through("proj", narrow),
        "fc1": through("fc1", narrow), "fc1 + gelu": through("fc1", narrow, gelu=True),
        "fc2": through("fc2", wide), "row kernels": norm_rows,
        "final linear": lambda: lean.final(last),
    }  # fmt: skip


def profile_row(
    forward: Part, lean: LeanTransformer, batch: int, precision: str, timer: Timer
) -> Row:
    """Each operator of the lean forward alone, and the forward itself, interleaved."""
    with torch.inference_mode():
        functions: dict[str, Part] = {"forward": forward, **forward_parts(lean, batch)}
        with timer.load.sampled():
            samples = interleave(functions, timer.rounds, warmup=1)
    whole = spread(samples.pop("forward"))
    parts = {part: spread(taken).median for part, taken in samples.items()}
    return {"status": "ok", "precision": precision, "ms": vars(whole), "operators_ms": parts,
            "shares": shares(parts, whole.median)}  # fmt: skip


def shares(parts_ms: dict[str, float], forward_ms: float) -> list[dict[str, Any]]:
    """Milliseconds and shares of the forward, down to "rest"; "fc1 + gelu" is split into its two.

    The split is a difference of two measurements and may come out below zero.
    """
    split = {
        "linears": sum(parts_ms[name] for name in ("qkv", "proj", "fc1", "fc2", "final linear")),
        "gelu": parts_ms["fc1 + gelu"] - parts_ms["fc1"],
        "attention": parts_ms["attention"],
        "row kernels": parts_ms["row kernels"],
    }
    split["rest"] = forward_ms - sum(split.values())
    return [{"part": part, "ms": ms, "share": ms / forward_ms} for part, ms in split.items()]


KERNELS = 20
"""The number of a step's kernels in a report, the longest first."""


def kernel_row(model: str, work: Work, precision: str) -> Row:
    """Profiles one of several guided steps of the lean backend, with torch's profiler.

    The row has the number of kernels (on a CPU, of operators), the `KERNELS` longest ones, the
    milliseconds of all, and the calls with which the host launched them.
    Raises RuntimeError if the profiler recorded no kernel.
    """
    from torch.profiler import ProfilerActivity, profile

    cuda, config = work.engine.device.type == "cuda", work.engine.config
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    settle = partial(torch.cuda.synchronize, work.engine.device) if cuda else lambda: None
    labels = torch.cat([work.classes, torch.full_like(work.classes, config.null_class)])
    table = step_coefficients("ddim", work.schedule, config.learn_sigma)
    scales = torch.full((work.images,), SCALE, dtype=torch.float64)
    events: list[Any] = []
    with torch.inference_mode():
        fused = work.networks.backend("lean", precision).fuse(
            labels, work.timesteps, table, scales, min(CHANNELS, config.in_channels)
        )
        assert fused is not None
        z, x0 = work.x, torch.zeros_like(work.x)
        for k in range(4):  # the first profile also contains the start of the profiler
            settle()
            with profile(activities=[activity]) if k > 1 else nullcontext() as profiler:
                z, x0 = fused.guided_step(z, x0, None, k, True)
                settle()
            events = list(profiler.key_averages()) if profiler is not None else []
        fused.release()
    time = "self_device_time_total" if cuda else "self_cpu_time_total"  # µs
    own = [e for e in events if e.device_type.name == activity.name]  # not the host's calls
    kernels = [(e.key, e.count, getattr(e, time) / 1e3) for e in own]
    kernels.sort(key=lambda kernel: kernel[2], reverse=True)
    total = sum(ms for _, _, ms in kernels)
    if not total > 0:
        raise RuntimeError("the profiler saw no kernel")
    return {
        "section": "kernels", "case": f"{model}, batch {work.images}", "images": work.images,
        "contender": f"lean {precision}", "role": "subject", "precision": precision, "status": "ok",
        "ms": {"median": total}, "launches": sum(count for _, count, _ in kernels),
        "host_launches": {e.key: e.count for e in events
                          if e not in own and "Launch" in e.key},
        "shares": [{"part": name, "count": count, "ms": ms, "share": ms / total}
                   for name, count, ms in kernels[:KERNELS]],
    }  # fmt: skip
