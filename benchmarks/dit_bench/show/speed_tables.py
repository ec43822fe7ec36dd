"""Tables of times and costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dit_bench.report import PARTS, Report, Row
from dit_bench.show.tables import DASH, Cell, Table, cell_of, grid, table_of

WHAT = {"forward": "one forward", "step": "one guided step", "decode": "VAE decode",
        "image": "whole generation"}  # fmt: skip
_TIMES = (
    "error: relative, against eager float32 on the same weights and inputs, before timing",
    "noisy: p95 − p5 above {noise_bound:.0%} of the median, or n (the number of samples) below 5",
)
_IMAGE = (
    "a whole generation: {steps} steps of {sampler}, guided, with the VAE if there is one; its "
    "error is that of one step or of the decoding, whichever is nearest to what is allowed there"
)
_NUMERICS = (
    "{}: measured with numerics 'diffusers', the function that all of these peers compute; "
    "the samples of --parity are made with the model's own"
)
_RATES = (
    "true FLOPs of the whole network, conditioning included; FLOP per byte and % of copy are of "
    "one pass over the weights that every step needs, which those of the conditioning are not"
)


def verdict(row: Row) -> str:
    """The remark on a row: why it has no figures, or what its figures show."""
    if row["status"] != "ok":
        status = row["status"].upper() if row["status"] == "wrong" else row["status"]
        return f"{status}: {row['reason']}"
    return row.get("verdict") or ("noisy" if row.get("noisy") else row.get("result", ""))


def what(row: Row) -> str:
    return f"{row['case']}: {WHAT.get(row['section'], row['section'])}"


def cost_table(models: Iterable[Row]) -> Table:
    columns: dict[str, Cell] = {
        "model": "model", "px": "size", "parameters, M": "cost.total.parameters/1e6:.4g",
        "GMACs": "cost.total.macs/1e9:.4g",
        "weights": lambda model: "random" if model["weights"] == "random" else "trained",
        **{name: f"cost.parts.{name}.macs/1e9:.3g" for name in PARTS},
        "true GFLOPs": "cost.total.flops/1e9:.4g",
        "torch counts": "cost.total.counted_flops/1e9:.4g",
        "VAE decoder, GMACs": "decoder.macs/1e9:.4g",
    }  # fmt: skip
    title = "Cost of one image's forward; parts in GMACs (the paper's Gflops)"
    return table_of(title, models, columns, short=4)


def latency_table(report: Report, rows: Sequence[Row]) -> Table:
    columns: dict[str, Cell] = {
        "": what, "by": "contender", "verdict": verdict, "median ms": "ms.median:ms",
        "p5": "ms.p5:ms", "p95": "ms.p95:ms", "n": "ms.n", "images/s": "images_s:.3g",
        "error": "error:error", "allowed": "bound:error", "set-up s": "setup_s:.2f",
        "first call s": "first_call_s:.2f", "time ÷ subject's (p5–p95)": "ratio:ratio.2f",
    }  # fmt: skip
    settings = {"noise_bound": 0.25, **report["settings"]}
    notes = [note.format(**settings) for note in _TIMES]
    if {"steps", "sampler"} <= settings.keys() and any(row["section"] == "image" for row in rows):
        notes.append(_IMAGE.format(**settings))
    compared = [m["model"] for m in report.get("models", ())
                if m["config"]["numerics"] == "diffusers"]  # fmt: skip
    if compared:
        notes.append(_NUMERICS.format(", ".join(compared)))
    return table_of("Times", rows, columns, *notes, grouped=True, short=4)


def rates_table(report: Report, rows: Sequence[Row]) -> Table:
    columns: dict[str, Cell] = {
        "": what, "by": "contender", "TFLOP/s": "tflop_s:.3g",
        "% of matrix products": "percent_of_matmul:.0f", "bound by": "bound_by",
        "GFLOP": "gflops:.4g", "FLOP per byte": "flops_per_byte:.3g",
        "% of copy": "percent_of_copy:.0f", "built MiB": "built_mib:.0f",
        "peak MiB": "peak_mib:.0f",
    }  # fmt: skip
    notes = [_RATES]
    if any("peak_mib" in row for row in rows):
        notes.append("MiB: above what was taken before; a backend is built for the first number "
                     "of images")  # fmt: skip
    used = [row for row in rows if row["status"] == "ok" and "tflop_s" in row]
    return table_of("What of the machine is used", used, columns, *notes, short=5)


def ratio_table(ratios: Iterable[Row]) -> Table:
    columns: dict[str, Cell] = {
        "": "case", "times": lambda row: f"{row['ours']} ÷ {row['theirs']}",
        "result": lambda row: f"skipped: {row['reason']}" if "reason" in row else row["result"],
        "median (p5–p95)": "ratio:ratio.3f", "at most": "goal:.2f",
        "with conditioning": "conditioned:.3f", "ours ms": "ours_ms:ms",
        "theirs ms": "theirs_ms:ms",
    }  # fmt: skip
    return table_of("Ratios of times", ratios, columns, grouped=True, short=4)


def ratio_grid(ratios: Iterable[Row]) -> Table:
    """The ratios in few columns, without goals and quantiles."""

    def cells(row: Row) -> dict[str, object]:
        name = f"{row['ours']} ÷ {row['theirs']}"
        if "reason" in row:
            return {name: f"skipped: {row['reason']}"}
        return {f"{row['ours']}, ms": cell_of(row, "ours_ms:ms"),
                name: cell_of(row, "ratio.median:.2f")}  # fmt: skip

    return grid("Medians of times and of their ratios; below 1, the first is quicker", ratios,
                {"": "case"}, cells)  # fmt: skip


def times_grid(rows: Sequence[Row]) -> Table:
    """The times in few columns, without errors and quantiles."""
    subject = next((row["contender"] for row in rows if row.get("role") == "subject"), "subject")

    def cells(row: Row) -> dict[str, object]:
        name = row["contender"]
        if row["status"] != "ok":
            return {f"{name}, ms": verdict(row)}
        shown = {f"{name}, ms": f"{cell_of(row, 'ms.median:ms')}{', noisy' * row['noisy']}"}
        gflops = cell_of(row, "gflops/2:.4g")
        if name == subject:
            return {"Gflops (multiply-adds)": gflops, **shown,
                    "TFLOP/s": cell_of(row, "tflop_s:.2f")}  # fmt: skip
        first = {f"{name}, Gflops": gflops} if row.get("role") == "other network" else {}
        return {**first, **shown, f"{name} ÷ {subject}": cell_of(row, "ratio:ratio.2f")}

    return grid("Medians of times, and ratios within a round (p5–p95)", rows, {"": what}, cells)


def operator_table(report: Report, rows: Iterable[Row]) -> Table:
    columns: dict[str, Cell] = {
        "operator": "operator", "shape": "shape", "by": "contender",
        "": lambda row: "" if row["status"] == "ok" else verdict(row),
        "median ms": "ms.median:ms", "% of ceiling": "percent_of_ceiling:.0f",
        "rate": lambda row: f"{row['rate']:.3g} {row.get('unit', '')}" if "rate" in row else DASH,
        "dtype": "dtype", "eager ÷ it": "speedup_over.eager:.2f",
        "torch.compile ÷ it": "speedup_over.compile:.2f",
    }  # fmt: skip
    broken = ("wrong", "failed", "late")
    own = [r for r in rows if r.get("role") != "peer" and ("ms" in r or r["status"] in broken)]
    reached = report.get("ceilings") or {"matmul_tflop_s": {}}
    notes = [
        f"100 %: {rate:.3g} TFLOP/s in matrix products of {dtype}, {reached['copy_gb_s']:.3g} GB/s "
        "in copying, which what fits into the caches exceeds"
        for dtype, rate in reached["matmul_tflop_s"].items()
        if dtype in {row.get("dtype") for row in own}
    ]
    title = "Operators: % of matrix products (TFLOP/s) or of copying (GB/s)"
    return table_of(title, own, columns, *notes, short=6)


def profile_table(report: Report, rows: Iterable[Row]) -> Table:
    def cells(row: Row) -> Mapping[str, object]:
        if row["status"] != "ok":
            return {"ms": verdict(row)}
        whole, shown = row["ms"]["median"], {p["part"]: f"{p['share']:.1%}" for p in row["shares"]}
        linears = {
            f"of it {name}": f"{row['operators_ms'][name] / whole:.1%}"
            for name in ("qkv", "proj", "fc1", "fc2")
            if name in row["operators_ms"]
        }
        return {"ms": f"{whole:.4g}", "linears": shown.get("linears", DASH)} | linears | shown

    return grid(
        "Where the time of one forward goes, each part measured alone in sequence",
        rows,
        {"one forward": lambda row: f"{row['case']}, {row['contender']}"},
        cells,
        short=3,
    )


def busy_table(report: Report, rows: Iterable[Row]) -> Table:
    def cells(row: Row) -> dict[str, object]:
        if row["status"] != "ok":
            return {row["contender"]: verdict(row)}
        idle, busy = cell_of(row, "idle_ms:ms"), cell_of(row, "busy_ms:ms")
        return {row["contender"]: f"{idle} → {busy} ({row['ratio']['median']:.2f})"}

    return grid("Milliseconds, idle → beside busy programs (median of the ratios)", rows,
                {"one forward": "case", "busy programs": "neighbours"}, cells)  # fmt: skip


def memory_table(report: Report, rows: Iterable[Row]) -> Table:
    def needed(row: Row) -> str:
        return f"{sum(row['needed'].values()) / 2**20:.0f}" if "needed" in row else DASH

    columns: dict[str, Cell] = {
        "": "case", "by": "contender", "result": verdict, "peak ÷ needed": "value:.2f",
        "at most": "goal:.2f", "needed MiB": needed,
        "after load": f"after_load.total/{2**20}:.0f",
        "peak in a step": f"peak_while_running.total/{2**20}:.0f",
        "of it in no file": f"peak_while_running.anonymous/{2**20}:.0f",
        "peak while loading": f"peak_while_loading.total/{2**20}:.0f",
    }  # fmt: skip
    title = "Memory of a step: weights and activations are needed"
    return table_of(title, rows, columns, short=5)


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    columns: dict[str, Cell] = {
        "": what, "by": "contender", "new ÷ old": "ratio:.3f", "verdict": "verdict",
        "old ms": "old_ms:ms", "new ms": "new_ms:ms",
    }  # fmt: skip
    lost = [f"LOST: {each}" for each in comparison.get("lost", ())]
    return table_of("Against the older report", comparison["rows"], columns, *comparison["notes"],
                    *lost, short=4)  # fmt: skip
