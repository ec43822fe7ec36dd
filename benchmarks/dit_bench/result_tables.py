"""Markdown tables of results: operators, a forward's time and its bound, the paper's claims."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dit_bench.cost import dit_cost
from dit_bench.escaped import of_escaped
from dit_bench.hardware import same_processor
from dit_bench.load import not_quoted
from dit_engine.config import ModelConfig


@of_escaped
def bounds_table(cpu: dict[str, Any], operators: dict[str, Any]) -> str:
    """Of the first workload of a `dit_bench.cpu` report, beside a `dit_bench.operators` report of
    the same machine: the least ratio to each peer that its products allow, at the best rate that
    any product of the same precision reached in the latter, if everything else took no time."""
    one, other = cpu["hardware"], operators["environment"]
    threads = one["torch_threads"] == other["torch_threads"]
    if not (threads and same_processor(one["cpu"], other["cpu"])):
        machines = [{key: m[key] for key in ("cpu", "torch_threads")} for m in (one, other)]
        raise ValueError(f"the reports are of two machines: {machines[0]} and {machines[1]}")
    section = cpu["sections"][0]
    workload = section["workload"]
    found = re.fullmatch(r"(\S+), batch (\d+)", workload)
    if found is None or not all("bar" in row and row["bar"] for row in section["rows"]):
        raise ValueError(f"workload {workload!r} is not one with goals")
    gflop = 2 * int(found[2]) * product_macs(ModelConfig.named(found[1])) / 1e9
    rates = {precision: max(product_rates(operators, precision)) for precision in ("bf16", "int8")}
    least = {precision: gflop / rate for precision, rate in rates.items()}  # ms: GFLOP / TFLOP/s
    lines = [
        "| ratio | goal, for AMX | reached | least possible here |",
        "|---|---|---|---|",
    ]
    for row in section["rows"]:
        if "skipped" in row or row["theirs"] == "linears alone":
            continue
        ours = least[row["ours"].removeprefix("lean ")]
        lines.append(
            f"| {row['ours']} ÷ {row['theirs']} | {row['bar']:.2f} | {row['ratio']['median']:.2f} "
            f"| {ours / row['theirs_ms']:.2f} |"
        )
    note = (
        f"The linear layers of the blocks are {gflop:.0f} GFLOP in one forward of {workload}. At "
        f"the best rate of any product measured on this processor, {rates['bf16']:.3f} TFLOP/s in "
        f"bf16 and {rates['int8']:.3f} in int8, they take {least['bf16']:.0f} and "
        f"{least['int8']:.0f} ms however the rest is done. {_busy(cpu)}{_busy(operators)}".rstrip()
    )
    return _with_note(lines, note)


def product_macs(config: ModelConfig) -> int:
    """Multiply-adds of the blocks' four linear layers for one image: 28 × 256 × 12 × 1152² of
    DiT-XL/2 at 256 px."""
    parts = dit_cost(config)
    return parts["attention_linear"].macs + parts["mlp"].macs


def product_rates(operators: dict[str, Any], precision: str) -> Iterator[float]:
    """TFLOP/s of every matrix product in "bf16" or "int8" of a `dit_bench.operators` report."""
    if precision == "bf16":
        yield operators["ceilings"]["matmul_tflop_s"]["bf16"]
    for row in operators["operators"]:
        if row["operator"] == "linear_int8":
            found = "bf16" if row.get("opponent") else "int8"  # which computes it in half precision
        else:
            found = row["dtype"] if row["operator"] in ("linear", "linear_gelu") else None
        if found == precision and row["status"] == "ok" and "rate" in row:
            yield row["rate"]


def _with_note(lines: list[str], note: str) -> str:
    return "\n".join([*lines, "", note]) + "\n"


@of_escaped
def operators_table(report: dict[str, Any]) -> str:
    """Of a `dit_bench.operators` report: how often as quick as its opponents each operator is."""
    lines = [
        "| operator | shape | by | ms | ÷ eager's time | ÷ torch.compile's | % of the ceiling |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["operators"]:
        if "ms" not in row or row.get("opponent"):
            continue
        over = row["speedup_over"]
        ratios = [f"{1 / over[name]:.2f}" if name in over else "–" for name in ("eager", "compile")]
        share = row["percent_of_ceiling"]
        lines.append(
            f"| `{row['operator']}` | {row['shape']} | {row['impl']} | {row['ms']['median']:.3g} | "
            f"{' | '.join(ratios)} | {'–' if share is None else f'{share:.0f}'} |"
        )
    ceilings = report["ceilings"]
    note = (
        f"bf16 on {report['environment']['cpu']}; ceilings: a matrix product of torch's with "
        f"{ceilings['matmul_size']}² at {ceilings['matmul_tflop_s']['bf16']:.3f} TFLOP/s, a copy "
        f"at {ceilings['copy_gb_s']:.0f} GB/s, which what fits the caches exceeds. {_busy(report)}"
    )
    return _with_note(lines, note.rstrip())


@of_escaped
def profile_table(report: dict[str, Any]) -> str:
    """Of ``dit_bench.cpu --profile``: where each forward's time goes."""
    parts = [share["part"] for share in report["sections"][0]["profile"]["shares"]]
    lines = [
        f"| one forward | ms | {' | '.join(parts)} |",
        "|---" * (2 + len(parts)) + "|",
    ]
    for section in report["sections"]:
        profile = section["profile"]
        shares = {share["part"]: f"{100 * share['share']:.1f}%" for share in profile["shares"]}
        lines.append(
            f"| {section['workload']} | {profile['forward_ms']:.4g} | "
            f"{' | '.join(shares[part] for part in parts)} |"
        )
    note = f"On {report['hardware']['cpu']}, each part alone in turn. {_busy(report)}"
    return _with_note(lines, note.rstrip())


def _busy(report: dict[str, Any]) -> str:
    busy = not_quoted(report)
    return "" if busy is None else f"The machine was {busy}: measure again. "


@of_escaped
def paper_models_table(report: dict[str, Any]) -> str:
    """Of a ``dit-bench … --peers unet`` report: time against Gflops, the U-Net's beside it."""
    head = (
        "| model | Gflops, as the paper counts | one forward, ms (5–95 %) | achieved TFLOP/s | "
        "the 104-Gflops U-Net's time ÷ it |"
    )
    lines = [head, "|---|---|---|---|---|"]
    rows = [row for row in report["measurements"] if row["what"] == "forward"]
    if not rows:
        raise ValueError("no forward of a model was timed")
    macs = {model["model"]: sum(p["macs"] for p in model["cost"]["parts"].values()) / 1e9
            for model in report["models"]}  # fmt: skip
    for row in rows:
        if "ratio" in row:
            continue
        unet = next((r for r in rows if r["model"] == row["model"] and "ratio" in r), None)
        if unet is None or row["status"] != "ok":
            raise ValueError(f"{row['model']} or the U-Net beside it was not timed")
        noisy = " (noisy)" if row["noisy"] or unet["noisy"] else ""
        ms, ratio = row["ms"], unet["ratio"]
        lines.append(
            f"| DiT-{row['model']}{noisy} | {macs[row['model']]:.1f} | {ms['median']:.0f} "
            f"({ms['p5']:.0f}–{ms['p95']:.0f}) | {row['tflop_s']:.2f} | {ratio['median']:.2f} "
            f"({ratio['p5']:.2f}–{ratio['p95']:.2f}) |"
        )
    environment = report["environment"]["hardware"]
    note = (
        f"{rows[0]['name']}, batch {rows[0]['images']}, {environment['cpu']}, "
        f"{environment['torch_threads']} threads, load average {report['load_average']:.2f} at the "
        f"start; interleaved within each line. The U-Net is diffusers' UNet2DConditionModel, in "
        f"eager torch and the same precision. {_busy(report)}".rstrip()
    )
    return _with_note(lines, note)
