"""What the CPU benchmark measures, one section each: a forward, a decode, memory, a profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_bench.cpu_forward import STEPS, Forward, forward_peers, random_model
from dit_bench.cpu_report import (
    DECODE,
    Comparison,
    forward_comparisons,
    hoisted_ms,
    make_row,
    memory_row,
)
from dit_bench.cpu_timing import interleave_visits
from dit_bench.load import OtherLoad
from dit_bench.peers import Peer, build_peers
from dit_engine.config import ModelConfig
from dit_engine.io.printable import one_line
from dit_engine.model import DiT

Log = Callable[[str], object]
Section = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """rounds of interleaved timing; threads of every runtime; modes of torch.compile to try; what
    other programs do while times are taken."""

    rounds: int
    threads: int
    compile_modes: tuple[str, ...]
    load: OtherLoad = field(default_factory=OtherLoad)


def model_of(name: str) -> DiT:
    """Random weights for a published size; the built-in model's own for "builtin".

    With diffusers' numerics, so that diffusers' transformer computes the same function.
    """
    if name == "builtin":
        from dit_engine.checkpoint import load_model

        return load_model(name, numerics="diffusers", dtype=torch.float32).requires_grad_(False)
    return random_model(ModelConfig.named(name, numerics="diffusers"))


def run_forward(name: str, batch: int, settings: Settings, log: Log) -> Section:
    """Build, check and time everyone on one forward pass."""
    from dit_bench.cpu_profile import Linears

    workload = f"{name}, batch {batch}"
    log(f"{workload}: building")
    forward = Forward(model_of(name), batch, settings.threads)

    def linears() -> Callable[[], Any]:
        return Linears(forward.lean_transformer("bf16"), batch).all

    peers = [*forward_peers(forward, settings.compile_modes), Peer("linears alone", None, linears)]
    expected = forward.expected()
    comparisons = forward_comparisons(with_bars=name == "XL/2")
    return _compare(workload, peers, expected, forward.bf16_error(expected), comparisons,
                    settings, log)  # fmt: skip


def run_decode(settings: Settings, log: Log) -> Section:
    """The decoder of Stable Diffusion's VAE (random weights), one image of 256 px."""
    from dit_bench.cpu_vae import Decode, decode_peers
    from dit_engine.vae import VAEConfig

    workload = "VAE decode, 256 px, batch 1"
    log(f"{workload}: building")
    decode = Decode(VAEConfig(), 32, 1, settings.threads)
    expected = decode.expected()
    return _compare(workload, decode_peers(decode), expected, decode.bf16_error(expected), DECODE,
                    settings, log)  # fmt: skip


def _compare(
    workload: str,
    peers: Sequence[Peer],
    expected: torch.Tensor,
    bf16_error: float,
    comparisons: Sequence[Comparison],
    settings: Settings,
    log: Log,
) -> Section:
    built = build_peers(peers, expected, bf16_error, log)
    log(f"{workload}: {settings.rounds} rounds of {len(built.functions)}")
    with settings.load.sampled():
        times = interleave_visits(built.functions, settings.rounds)
    hoisted = {name: hoisted_ms(name, times) for name in built.functions}
    return {
        "workload": workload,
        "bf16_eager_error": bf16_error,
        "peers": built.records,
        "samples_ms": {k: [round(ms, 4) for ms in v] for k, v in times.samples_ms.items()},
        "conditioning_ms": {k: ms for k, ms in hoisted.items() if ms is not None},
        "conditioning_steps": STEPS,
        "rows": [make_row(workload, comparison, built, times) for comparison in comparisons],
    }


def run_memory(name: str, settings: Settings, log: Log) -> Section:
    """Resident memory of the lean forward, in a child process."""
    from dit_bench.cpu_memory import measure

    workload = f"{name}, batch 2, lean bf16: memory"
    log(f"{workload}: measuring in a process of its own")
    try:
        measured: Section | str = measure(model_of(name), 2, "bf16", settings.threads)
    except (RuntimeError, ValueError) as error:
        measured = one_line(error)
        log(f"  skipped: {measured}")
    return {"workload": workload, "rows": [memory_row(workload, measured, name == "XL/2")]}


def run_profile(name: str, precision: str, settings: Settings, log: Log) -> Section:
    """Each operator of the lean forward alone, and the forward itself, interleaved."""
    from dit_bench.cpu_profile import forward_parts, shares

    workload = f"{name}, batch 2, lean {precision}"
    log(f"{workload}: building it and its parts")
    forward = Forward(model_of(name), 2, settings.threads)
    with torch.inference_mode():
        functions: dict[str, Callable[[], Any]] = {"forward": forward.lean(precision)}
        functions |= forward_parts(forward.lean_transformer(precision), 2)
        for function in functions.values():
            function()
        with settings.load.sampled():
            times = interleave_visits(functions, settings.rounds)
    parts = {part: times.ms(part).median for part in functions}
    forward_ms = parts.pop("forward")
    return {
        "workload": workload,
        "profile": {
            "forward_ms": forward_ms,
            "operators_ms": parts,
            "shares": [
                {"part": part, "ms": ms, "share": share}
                for part, ms, share in shares(parts, forward_ms)
            ],
        },
    }
