"""Who takes part in a forward, a guided step, a decode and a generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from dit_bench.contenders import FORMS, LIBRARIES, Contender, Name, float_dtype
from dit_bench.cost import Cost, needed_weights
from dit_bench.speed.forward import Work, decoder_dtype
from dit_bench.speed.generation import GenerationCheck
from dit_bench.unet import NAME as UNET
from dit_bench.unet import unet_cost

Part = tuple[str, Callable[[Work], Callable[[], Any]]]
"""A part of a forward that is timed by itself: its name, and what builds it."""


def contenders(
    kind: str,
    work: Work,
    names: Sequence[Name],
    record: dict[str, Any],
    check: GenerationCheck,
    parts: Sequence[Part] = (),
) -> list[Contender]:
    """Who takes part in one kind of work: the first of ``names`` is the subject, others are peers.

    record: what the model costs. check: of whole generations, which says how they are made. parts:
    of a forward.
    """
    pairs = [("peer" if i else "subject", pair) for i, pair in enumerate(dict.fromkeys(names))]
    n, forward_flops = work.images, record["cost"]["total"]["flops"]
    decoder_flops = record["decoder"]["flops"] if record["decoder"] else 0
    if kind == "decode":
        return _decoders(work, pairs, decoder_flops)
    found: list[Contender] = []
    for role, (name, precision) in pairs:
        if name == "unet":
            found += [_unet(work, precision)] if kind == "forward" else []
            continue
        title = f"{name} {precision}"
        common = {
            "flops": {"forward": n, "step": 2 * n}.get(kind, 0) * forward_flops,
            "weight_bytes": needed_weights(work.engine.config) * _bytes(precision),
        }
        if kind == "forward":
            run = partial(work.forward, name, precision)
            found.append(Contender(title, role, precision, run, **common))
        elif name in (*LIBRARIES, *FORMS):
            continue
        elif kind == "step":
            run = partial(work.guided_step, name, precision)
            found.append(Contender(title, role, precision, run, **common))
        else:  # a whole generation, guided: two rows per image and step
            run = partial(work.generation, name, precision, check.steps, check.sampler)
            flops = n * (2 * check.steps * forward_flops + decoder_flops)
            found.append(Contender(title, role, precision, run, flops=flops,
                                   check=partial(check, name, precision)))  # fmt: skip
    if kind == "forward":
        found += [Contender(name, "part", "bf16", partial(make, work), checked=False)
                  for name, make in parts]  # fmt: skip
    return found


def _decoders(work: Work, pairs: list[tuple[str, Name]], flops: int) -> list[Contender]:
    """int8 and bf16 decode alike, and so do the compilers: the first stands for both."""
    found: dict[str, Contender] = {}
    for role, (name, precision) in pairs:
        if name not in ("unet", *FORMS):
            dtype = "fp32" if decoder_dtype(precision) == torch.float32 else "bf16"
            run, title = partial(work.decode, name, precision), f"{name} {dtype}"
            contender = Contender(title, role, dtype, run, flops=flops * work.images)
            found.setdefault(title, contender)
    return list(found.values())


def _unet(work: Work, precision: str) -> Contender:
    try:
        cost = unet_cost()
    except ImportError:  # said when it is built, as of every peer
        cost = Cost()
    return Contender(
        f"{UNET} {precision}", "other network", precision, partial(work.forward, "unet", precision),
        checked=False, flops=cost.flops * work.images,
        weight_bytes=cost.parameters * float_dtype(precision).itemsize,
    )  # fmt: skip


def _bytes(precision: str) -> int:
    return {"fp32": 4, "int8": 1, "fp8": 1}.get(precision, 2)
