"""Predicts what a step of XL/2 costs on Hopper, kernel by kernel. No kernel is run for it.

The floor is the longer of two times: the bytes that must cross the memory at the rate of large
copies, and the operations at the rate of large matrix products. A prediction adds three losses:
products are rounded up to whole tiles on whole multiprocessors, each tile has a start and an end,
and time passes between two kernels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from dit_bench.report import Report
from dit_engine.config import ModelConfig

ROWS = (64, 2)
DATASHEET_GB_S = {"H100": 3350, "H200": 4800}
"""NVIDIA's datasheets of the H100 SXM and of the H200 SXM. The two have the same chip."""
DATASHEET_TFLOP_S = 989.5
"""Dense bf16 of both, half of the datasheets' figure, which is with sparsity."""
MEASURED_GB_S, MEASURED_TFLOP_S = 4300, 790
"""What large copies (bytes read and written) and bf16 products of 8192³ reach on an H200. No report
in benchmarks/results holds these two figures."""
PROCESSORS = 132
L2_BYTES = 50 * 10**6
"""If the activations of one launch have at most so many bytes, the floor does not count them."""
FLOPS_PER_EXPONENTIAL = 256
"""A multiprocessor's 4096 bf16 operations per cycle, divided by its 16 exponentials per cycle."""
GAP_US = 1.5
"""Assumed, not measured: the time in a graph between the end of a kernel and the first work of the
next one, which depends on it."""
TILE_US = 1.0
"""Assumed, not measured: what a tile of a product costs beside its arithmetic, until its first
operands arrive and while its result leaves the registers."""
TILES = (128, 192, 256)  # columns, of tiles of 128 rows
SPLITS = (2, 3, 4)
GROUPS = ("products", "attention", "norms", "the rest")
PROFILED = {
    "attention": "attention|flash|fmha", "norms": "layernorm",
    "products": "product|gemm|nvjet|cutlass|splitk",
}  # fmt: skip
"""Group → pattern of the names that its kernels have in a profile."""


@dataclass(frozen=True)
class Kernel:
    """A kernel of a sampler step, launched ``launches`` times; the other figures are of one launch.

    Attributes:
        moved: bytes of activations; a tensor that is read and written counts twice.
        read: bytes of weights, and of tables that change with the step.
        flops: operations of matrix products.
        product: rows, inputs and outputs, if the kernel is a linear layer.
        exponentials: how many attention computes.
    """

    name: str
    launches: int
    moved: int
    read: int = 0
    flops: int = 0
    product: tuple[int, int, int] | None = None
    exponentials: int = 0


def step_kernels(config: ModelConfig, rows: int, splits: int | None = 0) -> list[Kernel]:
    """The kernels of a guided step of the lean backend in bf16, with 2 rows per image.

    splits: how a branch ends. 0: the norm after it adds the branch to the residual. None: the
        product adds it, in its epilogue. Above 0: the product is split over K into this number of
        parts, and the norm adds up their float32 partial sums.
    """
    d, t, depth = config.hidden_size, config.num_tokens, config.depth
    tokens, images, patch = rows * t, rows // 2, config.patch_size**2
    x, vector = 2 * tokens * d, 2 * rows * d  # bytes of the tokens, and of one modulation
    latents = 4 * images * config.in_channels * config.input_size**2
    width = 2 * (6 * depth + 2) * d  # bytes of all modulations of a row

    def product(name: str, launches: int, inputs: int, outputs: int) -> Kernel:
        moved, read = 2 * tokens * (inputs + outputs), 2 * (inputs + 1) * outputs
        return Kernel(name, launches, moved, read, 2 * tokens * inputs * outputs,
                      (tokens, inputs, outputs))  # fmt: skip

    def ending(name: str, inputs: int) -> list[Kernel]:
        """A branch's last product and the norm after it; y is the branch's result, in bytes."""
        made, bias = product(name, depth, inputs, d), 2 * d
        y = x if splits == 0 else 4 * tokens * d * (splits or 0)
        if splits is None:
            made = replace(made, moved=made.moved + x + vector)
        elif splits:
            made = replace(made, moved=made.moved - x + y, read=made.read - bias)
        norm = Kernel(f"norm after {name}", depth, 2 * x + 2 * vector)
        if splits is not None:
            norm = replace(norm, moved=norm.moved + x + y + vector, read=bias if splits else 0)
        return [made, norm]

    inputs, outputs = config.in_channels * patch, patch * config.out_channels
    return [
        Kernel("embed", 1, latents + x, 4 * (d * inputs + d + t * d), 2 * images * t * inputs * d),
        # At most one label per image, and the null class.
        Kernel("select step", 1, rows * width, min(rows, images + 1) * width),
        Kernel("first norm", 1, 2 * x + 2 * vector),
        product("qkv", depth, d, 3 * d),
        Kernel("attention", depth, 4 * x, flops=4 * tokens * t * d,
               exponentials=config.num_heads * tokens * t),
        *ending("proj", d),
        product("fc1 + GELU", depth, d, config.mlp_hidden_size),
        *ending("fc2", config.mlp_hidden_size),
        product("final linear", 1, d, outputs),
        Kernel("guided step", 1, 2 * tokens * outputs + 5 * latents),
    ]  # fmt: skip


class Rates(NamedTuple):
    """What a GPU sustains. gb_s: copies, 10⁹ bytes read and written per second. tflop_s: matrix
    products in bf16."""

    gb_s: float
    tflop_s: float

    def bytes_us(self, count: float) -> float:
        return count / self.gb_s / 1e3

    def flops_us(self, count: float) -> float:
        return count / self.tflop_s / 1e6


def rates(gpu: str) -> Rates:
    """The rates of "H100" or "H200". Copies reach the share of the datasheet's bandwidth that they
    reach on an H200."""
    share = MEASURED_GB_S / DATASHEET_GB_S["H200"]
    return Rates(share * DATASHEET_GB_S[gpu], MEASURED_TFLOP_S)


def floor_us(kernel: Kernel, gpu: Rates) -> float:
    """Microseconds that one launch needs at least."""
    crossing = kernel.read + (kernel.moved if kernel.moved > L2_BYTES else 0)
    return max(gpu.bytes_us(crossing), gpu.flops_us(kernel.flops))


def predicted_us(kernel: Kernel, gpu: Rates, splits: int = 1) -> float:
    """Microseconds predicted for one launch; splits: the number of parts of K in a product."""
    least = gpu.bytes_us(kernel.read + kernel.moved)
    if kernel.product is not None:
        least = max(least, min(_product_us(*kernel.product, n, splits, gpu) for n in TILES))
    elif kernel.exponentials:
        # Heads of 72 numbers are multiplied as 64 + 16; products and exponentials take turns.
        work = kernel.flops * 80 / 72 + FLOPS_PER_EXPONENTIAL * kernel.exponentials
        least = max(least, gpu.flops_us(work))
    return GAP_US + least


def _product_us(
    rows: int, inputs: int, outputs: int, columns: int, splits: int, gpu: Rates
) -> float:
    tiles = math.ceil(rows / 128) * math.ceil(outputs / columns) * splits
    tile = PROCESSORS * gpu.flops_us(2 * 128 * columns * inputs / splits) / feed_rate(columns)
    return math.ceil(tiles / PROCESSORS) * (tile + TILE_US)


def feed_rate(columns: int) -> float:
    """The share of the matrix rate at which shared memory can feed a tile of 128 rows.

    For 16 inputs, the tile takes ``columns`` cycles. Shared memory delivers 128 bytes a cycle: each
    half of the rows reads its own operands and those of all columns, and all are written once.
    """
    read, written = 2 * 32 * (64 + columns), 32 * (128 + columns)
    return min(1.0, 128 * columns / (read + written))


def step_us(config: ModelConfig, rows: int, splits: int | None, gpu: Rates) -> dict[str, float]:
    """Kernel → predicted microseconds of all its launches in a step."""
    parts = {"proj": splits or 1, "fc2": splits or 1}
    return {
        kernel.name: kernel.launches * predicted_us(kernel, gpu, parts.get(kernel.name, 1))
        for kernel in step_kernels(config, rows, splits)
    }


def endings(config: ModelConfig, rows: int) -> dict[int | None, float]:
    """How branches may end (see `step_kernels`) → predicted microseconds of a step on an H200."""
    gpu = rates("H200")
    return {end: sum(step_us(config, rows, end, gpu).values()) for end in (0, None, *SPLITS)}


def best_ending(config: ModelConfig, rows: int) -> int | None:
    found = endings(config, rows)
    return min(found, key=lambda end: found[end])


def group_of(kernel: Kernel) -> str:
    if kernel.product is not None:
        return "products"
    if kernel.exponentials:
        return "attention"
    return "norms" if "norm" in kernel.name else "the rest"


def measured_us(report: Report, rows: int) -> dict[str, float]:
    """Group → microseconds of its kernels in a GPU report's profile of a step, which holds the
    longest kernels only; "a step" → the timed step, with the gaps between kernels. Empty if the
    report has no such rows."""
    found: dict[str, float] = {}
    for row in report["rows"]:
        own = row["case"] == f"XL/2, batch {rows // 2}" and row["contender"] == "lean bf16"
        if own and row["section"] == "step" and row["status"] == "ok":
            found["a step"] = 1e3 * row["ms"]["median"]
        elif own and row["section"] == "kernels" and row["status"] == "ok":
            for kernel in row["shares"]:
                name = kernel["part"].lower()
                of = (group for group, said in PROFILED.items() if re.search(said, name))
                group = next(of, "the rest")
                found[group] = found.get(group, 0.0) + 1e3 * kernel["ms"]
    return found


def table(rows: int, report: Report | None = None) -> tuple[list[str], list[list[str]], str]:
    """Columns, lines and a note for a step of XL/2 with ``rows`` rows; ``report`` has the times."""
    config = ModelConfig.named("XL/2")
    splits = best_ending(config, rows)
    kernels = step_kernels(config, rows, splits)
    measured = {} if report is None else measured_us(report, rows)
    of_group: dict[str, list[Kernel]] = {group: [] for group in GROUPS}
    for kernel in kernels:
        of_group[group_of(kernel)].append(kernel)

    def times(chosen: Sequence[Kernel]) -> list[str]:
        found: list[float] = []
        for gpu in map(rates, DATASHEET_GB_S):
            predicted = step_us(config, rows, splits, gpu)
            found += (sum(k.launches * floor_us(k, gpu) for k in chosen),
                      sum(predicted[k.name] for k in chosen))  # fmt: skip
        return [_us(each) for each in found]

    lines = [
        [k.name, str(k.launches), f"{(k.read + k.moved) / 1e6:.1f}", f"{k.flops / 1e9:.1f}",
         *times([k]), ""]
        for k in kernels
    ]  # fmt: skip
    for name, chosen in {**of_group, "a step": kernels}.items():
        taken = _us(measured[name]) if name in measured else "–"
        count = str(sum(k.launches for k in chosen))
        lines.append([f"sum: {name}", count, "", "", *times(chosen), taken])
    others = [f"{_ending(end)} {_us(total)}" for end, total in endings(config, rows).items()
              if end != splits]  # fmt: skip
    measurement = "Not measured on a GPU yet"
    if report is not None:
        measurement = f"Measured on {report['machine']['gpu']}"
    note = (
        f"The table above has {rows} rows, and each branch ends with {_ending(splits)}. "
        f"The whole step with other ends, predicted on an H200, in µs: {', '.join(others)}. "
        f"{measurement}."
    )
    columns = ["kernel", "launches", "MB each", "GFLOP each"]
    columns += [f"{gpu} {kind}, µs" for gpu in DATASHEET_GB_S for kind in ("floor", "predicted")]
    return [*columns, "measured, µs"], lines, note


def sources() -> str:
    """Where the rates of the tables come from."""
    h100, h200 = (rates(gpu).gb_s / 1e3 for gpu in ("H100", "H200"))
    return (
        f"Floors use {h200:.2g} TB/s for the H200, which large copies reached on an H200 "
        f"(datasheet: {DATASHEET_GB_S['H200'] / 1e3:.2g}), and {h100:.2g} TB/s for the H100 SXM, "
        f"the same share of its datasheet's {DATASHEET_GB_S['H100'] / 1e3:.3g}. They use "
        f"{MEASURED_TFLOP_S} TFLOP/s for both GPUs, which have the same chip; products of "
        f"8192³ in bf16 reached that on the H200 (datasheet: {DATASHEET_TFLOP_S:.0f}). No report "
        "in benchmarks/results holds these two rates. A launch's activations count only if they "
        f"exceed the L2 cache of {L2_BYTES / 1e6:.0f} MB. Predictions count every byte and assume "
        f"{GAP_US} µs between kernels. They round products up to whole tiles of "
        f"{' or '.join(f'128 × {n}' for n in TILES)} on {PROCESSORS} multiprocessors, at the rate "
        f"at which shared memory can feed them, and add {TILE_US:g} µs per tile. Large products "
        "run at the power limit, so with few rows the clock may be higher."
    )


def _ending(splits: int | None) -> str:
    if splits is None:
        return "the product adding the residual"
    if splits:
        return f"the norm adding {splits} partial sums and the residual"
    return "the norm adding the residual"


def _us(count: float) -> str:
    return f"{count:,.0f}" if count >= 100 else f"{count:.1f}"
