"""Two tables of documents that are made of a CPU report: absolute times, and what bounds them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from textwrap import wrap

from dit_bench.cost import dit_cost
from dit_bench.machine import same_processor
from dit_bench.report import Report
from dit_engine.config import ModelConfig
from dit_engine.io.printable import markdown_text

WIDTH = 100

COLUMNS = {
    "lean int8": "lean int8", "lean bf16": "lean bf16", "openvino bf16": "OpenVINO bf16",
    "diffusers bf16": "diffusers bf16", "diffusers fp32": "diffusers as it comes (fp32)",
}  # fmt: skip


def speed_table(report: Report) -> str:
    """Milliseconds of one step with guidance, which is a forward with two rows per image."""
    cases: dict[str, dict[str, float]] = {}
    for row in report["rows"]:
        if row["section"] == "forward" and row["status"] == "ok":
            images = row["images"] // 2
            name = "built-in model" if row["model"] == "builtin" else f"DiT-{row['model']}"
            pixels = 64 if row["model"] == "builtin" else 256
            case = f"{name} at {pixels} px, {images} image{'s' * (images > 1)}"
            cases.setdefault(case, {})[row["contender"]] = row["ms"]["median"]
    if not cases:
        raise ValueError("no forward was timed")
    lines = [f"| ms for one step with guidance | {' | '.join(COLUMNS.values())} |",
             "|---" * (1 + len(COLUMNS)) + "|"]  # fmt: skip
    for case, found in cases.items():
        cells = [f"{found[name]:.4g}" if name in found else "–" for name in COLUMNS]
        lines.append(f"| {markdown_text(case)} | {' | '.join(cells)} |")
    machine = report["machine"]
    versions = machine["versions"]
    known = [f"{name} {versions[name]}" for name in ("torch", "diffusers", "openvino")
             if versions.get(name)]  # fmt: skip
    note = (
        f"On {machine['cpu']} with {machine['threads']} threads; medians of interleaved rounds "
        f"with the same weights and inputs, whose results were compared before timing. "
        f"{', '.join(known)}."
    )
    return "\n".join([*lines, "", *wrap(markdown_text(note), WIDTH, break_on_hyphens=False), ""])


def bounds_table(cpu: Report, operators: Report) -> str:
    """The least ratio to each peer that XL/2's matrix products allow on this machine, at the best
    rate that any product of the same precision reached, if everything else took no time."""
    one, other = cpu["machine"], operators["machine"]
    if not (one["threads"] == other["threads"] and same_processor(one["cpu"], other["cpu"])):
        machines = [{key: m[key] for key in ("cpu", "threads")} for m in (one, other)]
        raise ValueError(f"the reports are of two machines: {machines[0]} and {machines[1]}")
    ratios = [row for row in cpu["ratios"] if row["case"] == "XL/2, batch 2" and row["goal"]]
    if not ratios:
        raise ValueError("the report has no ratios of XL/2, batch 2")
    parts = dit_cost(ModelConfig.named("XL/2"))
    gflop = 4 * (parts["attention_linear"].macs + parts["mlp"].macs) / 1e9  # of two rows
    rates = {precision: max(product_rates(operators, precision)) for precision in ("bf16", "int8")}
    least = {precision: gflop / rate for precision, rate in rates.items()}  # ms: GFLOP / TFLOP/s
    lines = ["| ratio | goal, for AMX | reached | least possible here |", "|---|---|---|---|"]
    for row in ratios:
        if "reason" not in row and row["theirs"] != "linears alone":
            ours = least[row["ours"].removeprefix("lean ")]
            name = markdown_text(f"{row['ours']} ÷ {row['theirs']}")
            lines.append(f"| {name} | {row['goal']:.2f} | {row['ratio']['median']:.2f} "
                         f"| {ours / row['theirs_ms']:.2f} |")  # fmt: skip
    note = (
        f"The linear layers of the blocks are {gflop:.0f} GFLOP in one forward of XL/2 with 2 "
        f"rows. At the best rate of any product measured on this processor, {rates['bf16']:.3f} "
        f"TFLOP/s in bf16 and {rates['int8']:.3f} in int8, they take {least['bf16']:.0f} and "
        f"{least['int8']:.0f} ms however the rest is done."
    )
    return "\n".join([*lines, "", *wrap(markdown_text(note), WIDTH, break_on_hyphens=False), ""])


def product_rates(operators: Report, precision: str) -> Iterator[float]:
    """TFLOP/s of every matrix product in "bf16" or "int8" of a report of the operators."""
    if precision == "bf16":
        yield operators["ceilings"]["matmul_tflop_s"]["bf16"]
    for row in operators["rows"]:
        if row["operator"] == "linear_int8":
            # Its opponent computes the same product in half precision.
            found = "bf16" if row.get("role") == "peer" else "int8"
        else:
            found = row["dtype"] if re.fullmatch("linear(_gelu)?", row["operator"]) else None
        if found == precision and row["status"] == "ok" and "rate" in row:
            yield row["rate"]
