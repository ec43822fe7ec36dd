"""The tables of what was timed, and of what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dit_bench.report import PARTS, Report, Row
from dit_bench.show.cells import (
    Cell,
    Maker,
    error,
    grid,
    ratio,
    table_of,
    time_ms,
    value,
    verdict,
)
from dit_bench.show.tables import DASH, Table

WHAT = {"forward": "one forward", "step": "one guided step", "decode": "VAE decode",
        "image": "whole generation"}  # fmt: skip
_TIMES = (
    "error: relative, against eager float32 on the same weights and inputs, before timing",
    "noisy: p95 − p5 above {noise_bound:.0%} of the median, or n (the number of samples) below 5",
    "set-up and the first call, which compiles, are in no other figure",
    "images/s: how often per second this is done for one image",
)
_IMAGE = (
    "a whole generation: {steps} steps of {sampler}, guided, with the VAE if there is one; its "
    "error is that of one step, which eager float32 takes again from the same latents, or of the "
    "decoding: whichever is nearest to what is allowed there"
)
_DECODER = "lean alone has a decoder of its own, other backends decode with torch"
_NUMERICS = (
    "{}: measured with numerics 'diffusers', the function that all of these peers compute; paired "
    "and shown samples are of the model's own"
)
_RATES = (
    "true FLOPs of the whole network, conditioning included; FLOP per byte and % of copy are of "
    "one pass over the weights that every step needs, which those of the conditioning are not"
)


def cost_table(models: Iterable[Row]) -> Table:
    def cost(key: str, unit: float, form: str) -> Cell:
        return value(f"cost.{key}", lambda count: f"{count / unit:{form}}")

    columns: dict[str, Cell] = {
        "model": value("model"), "px": value("size"),
        "weights": lambda m: "random" if m["weights"] == "random" else "trained",
        "parameters, M": cost("total.parameters", 1e6, ".4g"),
        "GMACs": cost("total.macs", 1e9, ".4g"),
        **{name: cost(f"parts.{name}.macs", 1e9, ".3g") for name in PARTS},
        "true GFLOPs": cost("total.flops", 1e9, ".4g"),
        "torch counts": cost("total.counted_flops", 1e9, ".4g"),
        "VAE decoder, GMACs": value("decoder.macs", lambda macs: f"{macs / 1e9:.4g}"),
    }  # fmt: skip
    return table_of(
        "Cost of one image's forward; parts in GMACs (the paper's Gflops)", models, columns,
        short=("model", "px", "parameters, M", "GMACs", "VAE decoder, GMACs"),
    )  # fmt: skip


_LINEARS = ("qkv", "proj", "fc1", "fc2")


def _subject(row: Row) -> str:
    return f"{row['case']}, {row['contender']}"


def _what(row: Row) -> str:
    return f"{row['case']}: {WHAT.get(row['section'], row['section'])}"


def latency_table(report: Report, rows: Sequence[Row]) -> Table:
    columns: dict[str, Cell] = {
        "": _what, "by": value("contender"), "verdict": verdict,
        "median ms": time_ms("ms.median"), "p5": time_ms("ms.p5"), "p95": time_ms("ms.p95"),
        "n": value("ms.n"), "images/s": value("images_s", ".3g"), "error": error("error"),
        "allowed": error("bound"), "set-up s": value("setup_s", ".2f"),
        "first call s": value("first_call_s", ".2f"), "time ÷ subject's (p5–p95)": ratio(".2f"),
    }  # fmt: skip
    settings, models = report["settings"], report.get("models", [])
    kinds = {row["section"] for row in rows}
    notes = [note.format(**{"noise_bound": 0.25, **settings}) for note in _TIMES]
    if "image" in kinds and {"steps", "sampler"} <= settings.keys():
        notes.append(_IMAGE.format(**settings))
    decoded = kinds & {"decode", "image"} and any(m["decoder"] for m in models)
    if decoded and len({row["contender"] for row in rows}) > 1:
        notes.append(_DECODER)
    compared = [m["model"] for m in models if m["config"]["numerics"] == "diffusers"]
    if compared:
        notes.append(_NUMERICS.format(", ".join(compared)))
    return table_of("Times", rows, columns, *notes, left=3, grouped=1,
                    short=("", "by", "verdict", "median ms"))  # fmt: skip


def rates_table(report: Report, rows: Sequence[Row]) -> Table:
    columns: dict[str, Cell] = {
        "": _what, "by": value("contender"), "GFLOP": value("gflops", ".4g"),
        "TFLOP/s": value("tflop_s", ".3g"),
        "% of matrix products": value("percent_of_matmul", ".0f"),
        "FLOP per byte": value("flops_per_byte", ".3g"), "bound by": value("bound_by"),
        "% of copy": value("percent_of_copy", ".0f"), "built MiB": value("built_mib", ".0f"),
        "peak MiB": value("peak_mib", ".0f"), "J per image": value("joules_per_image", ".3g"),
    }  # fmt: skip
    notes = [_RATES]
    if any("peak_mib" in row for row in rows):
        notes.append("MiB: above what was taken before; a backend is built for the first number "
                     "of images")  # fmt: skip
    used = [row for row in rows if row["status"] == "ok" and "tflop_s" in row]
    return table_of("What of the machine is used", used, columns, *notes, left=2,
                    short=("", "by", "TFLOP/s", "% of matrix products", "bound by"))  # fmt: skip


def ratio_table(ratios: Iterable[Row]) -> Table:
    columns: dict[str, Cell] = {
        "": value("case"), "times": lambda r: f"{r['ours']} ÷ {r['theirs']}",
        "result": lambda r: f"skipped: {r['reason']}" if "reason" in r else r["result"],
        "at most": value("goal", ".2f"), "median (p5–p95)": ratio(".3f"),
        "with conditioning": value("conditioned", ".3f"), "ours ms": time_ms("ours_ms"),
        "theirs ms": time_ms("theirs_ms"),
    }  # fmt: skip
    return table_of("Ratios of times", ratios, columns, left=3, grouped=1,
                    short=("", "times", "result", "median (p5–p95)"))  # fmt: skip


def ratio_grid(ratios: Iterable[Row]) -> Table:
    """The ratios in few columns, without goals and quantiles."""

    def cells(row: Row) -> dict[str, object]:
        name = f"{row['ours']} ÷ {row['theirs']}"
        if "reason" in row:
            return {name: f"skipped: {row['reason']}"}
        ms = f"{row['ours']}, ms"
        return {ms: time_ms("ours_ms")(row), name: f"{row['ratio']['median']:.2f}"}

    return grid("Medians of times and of their ratios; below 1, the first is quicker", ratios,
                {"": value("case")}, cells)  # fmt: skip


def times_grid(rows: Sequence[Row]) -> Table:
    """The times in few columns, without errors and quantiles."""
    subject = next((row["contender"] for row in rows if row.get("role") == "subject"), "subject")

    def cells(row: Row) -> dict[str, object]:
        by = f"{row['contender']}, ms"
        if row["status"] != "ok":
            return {by: verdict(row)}
        shown: dict[str, object] = {by: f"{time_ms('ms.median')(row)}{', noisy' * row['noisy']}"}
        gflops = value("gflops", lambda flops: f"{flops / 2:.4g}")(row)
        if row["contender"] == subject:
            rate = {"TFLOP/s": value("tflop_s", ".2f")(row)}
            return {"Gflops (multiply-adds)": gflops} | shown | rate
        if row.get("role") == "other network":
            shown = {f"{row['contender']}, Gflops": gflops} | shown
        return shown | {f"{row['contender']} ÷ {subject}": ratio(".2f")(row)}

    return grid("Medians of times, and ratios within a round (p5–p95)", rows, {"": _what}, cells)


def operator_table(report: Report, rows: Iterable[Row]) -> Table:
    columns: dict[str, Cell] = {
        "operator": value("operator"), "shape": value("shape"), "dtype": value("dtype"),
        "by": value("contender"), "": lambda r: "" if r["status"] == "ok" else verdict(r),
        "median ms": time_ms("ms.median"),
        "rate": lambda r: f"{r['rate']:.3g} {r['unit']}" if "rate" in r else DASH,
        "% of ceiling": value("percent_of_ceiling", ".0f"),
        "eager ÷ it": value("speedup_over.eager", ".2f"),
        "torch.compile ÷ it": value("speedup_over.compile", ".2f"),
    }  # fmt: skip
    broken = ("wrong", "failed", "late")
    own = [r for r in rows if r.get("role") != "peer" and ("ms" in r or r["status"] in broken)]
    reached = report.get("ceilings") or {"matmul_tflop_s": {}}
    notes = [
        f"100 %: {rate:.3g} TFLOP/s in matrix products of {dtype}, {reached['copy_gb_s']:.3g} GB/s "
        "in copying, which what fits into the caches exceeds"
        for dtype, rate in reached["matmul_tflop_s"].items()
        if dtype in {r["dtype"] for r in own}
    ]
    return table_of(
        "Operators: % of matrix products (TFLOP/s) or of copying (GB/s)", own, columns, *notes,
        left=5,
        short=("operator", "shape", "by", "", "median ms", "% of ceiling"),
    )  # fmt: skip


def profile_table(report: Report, rows: Iterable[Row]) -> Table:
    def cells(row: Row) -> Mapping[str, object]:
        if row["status"] != "ok":
            return {"ms": verdict(row)}
        whole = row["ms"]["median"]
        shown = {part["part"]: f"{part['share']:.1%}" for part in row["shares"]}
        linears = {f"of it {name}": f"{row['operators_ms'][name] / whole:.1%}"
                   for name in _LINEARS if name in row["operators_ms"]}  # fmt: skip
        first = {"ms": f"{whole:.4g}", "linears": shown.get("linears", DASH)}
        return first | linears | shown

    return grid("Where the time of one forward goes, each part measured alone in sequence", rows,
                {"one forward": _subject}, cells,
                short=("one forward", "ms", "linears", "attention", "rest"))  # fmt: skip


def busy_table(report: Report, rows: Iterable[Row]) -> Table:
    def cells(row: Row) -> dict[str, object]:
        if row["status"] != "ok":
            return {row["contender"]: verdict(row)}
        idle, busy = time_ms("idle_ms")(row), time_ms("busy_ms")(row)
        return {row["contender"]: f"{idle} → {busy} ({row['ratio']['median']:.2f})"}

    return grid("Milliseconds, idle → beside busy programs (median of the ratios)", rows,
                {"one forward": value("case"), "busy programs": value("neighbours")},
                cells)  # fmt: skip


def memory_table(report: Report, rows: Iterable[Row]) -> Table:
    def mib(key: str) -> Cell:
        return value(key, lambda count: f"{count / 2**20:.0f}")

    columns: dict[str, Cell] = {
        "": value("case"), "by": value("contender"), "result": verdict,
        "peak ÷ needed": value("value", ".2f"), "at most": value("goal", ".2f"),
        "needed MiB": value("needed", lambda parts: f"{sum(parts.values()) / 2**20:.0f}"),
        "after load": mib("after_load.total"), "peak in a step": mib("peak_while_running.total"),
        "of it in no file": mib("peak_while_running.anonymous"),
        "peak while loading": mib("peak_while_loading.total"),
    }  # fmt: skip
    return table_of("Memory of a step: weights and activations are needed", rows, columns, left=3)


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    columns: dict[str, Cell] = {
        "": _what, "by": value("contender"), "old ms": time_ms("old_ms"),
        "new ms": time_ms("new_ms"), "new ÷ old": value("ratio", ".3f"),
        "verdict": value("verdict"),
    }  # fmt: skip
    lost = [f"LOST: {what}" for what in comparison.get("lost", ())]
    return table_of("Against the older report", comparison["rows"], columns, *comparison["notes"],
                    *lost, left=2, right=1, short=("", "by", "new ÷ old", "verdict"))  # fmt: skip


SPEED_TABLES: dict[str, tuple[Maker, ...]] = {
    "work": (latency_table, rates_table),
    "memory": (memory_table,),
    "busy": (busy_table,),
    "profile": (profile_table,),
    "operator": (operator_table,),
}
"""The tables of each section. "work" stands for all of `WORK`."""
