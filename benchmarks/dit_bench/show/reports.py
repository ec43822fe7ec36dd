"""A report (`dit_bench.report`) as tables for people, in reading order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dit_bench.load import warning
from dit_bench.quality.paired import LEAST_RESAMPLES
from dit_bench.report import PARTS, WORK, Report, Row
from dit_bench.show.tables import DASH, Table

Cell = Callable[[Row], object]

NAMES = {
    "forward": "one forward", "step": "one guided step", "decode": "VAE decode",
    "image": "whole generation", "floor": "held-out images, the other half (the floor of this N)",
    "vae_reconstruction": "held-out images through the VAE (the best that a DiT could do)",
    "generated": "generated images", "held_out": "held-out images",
}  # fmt: skip
"""What the sections and cases of a report are called in tables."""

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
_PARITY = (
    "errors of the latents are relative, and the mean over N except for the worst; images are "
    "decoded in float32 by the same VAE, so that only the transformer differs"
)
_SETS = (
    "|Δ|: of the distances to the reference; the interval is from a bootstrap over pairs of one "
    "label and noise; if 0 lies in it, no difference was shown"
)


def report_tables(report: Report) -> list[Table]:
    """Everything that the report holds."""
    if "kind" not in report:
        from dit_bench.show.older import report_tables as older

        return older(report)
    rows: dict[str, list[Row]] = {}
    for row in report["rows"]:
        rows.setdefault("work" if row["section"] in WORK else row["section"], []).append(row)
    tables = [
        make(report, rows[section])
        for section, makers in _TABLES.items()
        if section in rows
        for make in makers
    ]
    if report.get("ratios"):
        tables.insert(0, ratio_table(report["ratios"]))
    if report.get("models"):
        tables.insert(0, cost_table(report["models"]))
    if "comparison" in report:
        tables.append(comparison_table(report["comparison"]))
    tables = [table for table in [machine_table(report), *tables] if table.rows]
    if not report["complete"]:
        why = f" ({report['failure']})" if "failure" in report else ""
        tables[-1].notes.append(f"INTERRUPTED{why}: what is missing above was not measured")
    return tables


def value(key: str, form: str | Callable[[float], str] = "") -> Cell:
    """A cell with the value at ``key``, such as "ms.median"; a dash if there is none."""

    def cell(row: Row) -> object:
        found: Any = row
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is None:
            return DASH
        return form(found) if callable(form) else format(found, form)

    return cell


def milliseconds(found: float) -> str:
    return f"{found:.4g}" if found < 1e4 else f"{found:.0f}"


def error(found: float) -> str:
    return f"{found:.1e}" if math.isfinite(found) else "not finite"


def table_of(
    title: str,
    rows: Iterable[Row],
    columns: Mapping[str, Cell],
    *notes: str,
    left: int = 1,
    right: int = 0,
    grouped: int = 0,
    short: Sequence[str] = (),
) -> Table:
    """One row per row of a report. ``grouped`` first cells are empty where they repeat."""
    table = Table(title, list(columns), left, right, notes=list(notes), short=short)
    last: list[object] = []
    for row in rows:
        cells = [cell(row) for cell in columns.values()]
        first = cells[:grouped]
        table.add(*([""] * grouped if first == last else first), *cells[grouped:])
        last = first
    return table


def machine_table(report: Report) -> Table:
    machine, table = report["machine"], Table("Measured on", ["", ""], left=2)
    for key in ("cpu", "gpu", "platform", "python"):
        if machine.get(key):
            table.add(key, machine[key])
    count = machine.get("cpu_count") or "unknown"
    table.add("device", f"{machine['device']}, {machine['threads']} of {count} CPU threads")
    known = [f"{k} {v}" for k, v in machine["versions"].items() if v]
    table.add("versions", ", ".join(known))
    table.add("instruction sets", " ".join(machine["instruction_sets"]) or "unknown")
    if (ceilings := report.get("ceilings")) is not None:
        rates = [f"{k} {v:.3g}" for k, v in ceilings["matmul_tflop_s"].items()]
        measured = ceilings.get("measured")
        when = f"; the best of those {measured} the run" if measured else ""
        size = ceilings["matmul_size"]
        table.add("matrix products", f"{', '.join(rates)} TFLOP/s ({size}²{when})")
        for kind, reason in ceilings["missing"].items():
            table.add("", f"{kind}: {reason}")
        table.add("copy", f"{ceilings['copy_gb_s']:.4g} GB/s (reads and writes)")
    if report.get("energy"):
        table.add("energy", report["energy"])
    if (load := report.get("load_average")) is not None:
        table.add("load average", f"{load:.2f} at the start")
    if (others := report.get("other_load")) is not None:
        table.add("other programs", f"used {others:.2f} processors while times were taken")
    settings = {k: v for k, v in report["settings"].items() if not isinstance(v, dict | list)}
    table.add("settings", ", ".join(f"{k} {v}" for k, v in settings.items()))
    if (busy := warning(report)) is not None:
        table.notes.append(busy)
    return table


def cost_table(models: Iterable[Row]) -> Table:
    def part(name: str) -> Cell:
        return lambda model: f"{model['cost']['parts'][name]['macs'] / 1e9:.3g}"

    def total(key: str, unit: float) -> Cell:
        return lambda model: f"{model['cost']['total'][key] / unit:.4g}"

    columns: dict[str, Cell] = {
        "model": value("model"),
        "px": value("size"),
        "weights": lambda m: "random" if m["weights"] == "random" else "trained",
        "parameters, M": total("parameters", 1e6),
        "GMACs": total("macs", 1e9),
        **{name: part(name) for name in PARTS},
        "true GFLOPs": total("flops", 1e9),
        "torch counts": total("counted_flops", 1e9),
        "VAE decoder, GMACs": value("decoder.macs", lambda macs: f"{macs / 1e9:.4g}"),
    }
    return table_of(
        "Cost of one image's forward; parts in GMACs (the paper's Gflops)", models, columns,
        short=("model", "px", "parameters, M", "GMACs", "VAE decoder, GMACs"),
    )  # fmt: skip


def _what(row: Row) -> str:
    return f"{row['case']}: {NAMES.get(row['section'], row['section'])}"


def _verdict(row: Row) -> str:
    if row["status"] != "ok":
        status = row["status"].upper() if row["status"] == "wrong" else row["status"]
        return f"{status}: {row['reason']}"
    return row.get("verdict") or ("noisy" if row.get("noisy") else row.get("result", ""))


def _spread(form: str = ".2f") -> Cell:
    def cell(row: Row) -> str:
        ratio = row.get("ratio")
        if ratio is None:
            return ""
        ends = [f"{ratio[end]:{form}}" for end in ("p5", "p95") if ratio.get(end) is not None]
        return f"{ratio['median']:{form}}" + (f" ({'–'.join(ends)})" if ends else "")

    return cell


_LATENCY: dict[str, Cell] = {
    "": _what,
    "by": value("contender"),
    "verdict": _verdict,
    "median ms": value("ms.median", milliseconds),
    "p5": value("ms.p5", milliseconds),
    "p95": value("ms.p95", milliseconds),
    "n": value("ms.n"),
    "images/s": value("images_s", ".3g"),
    "error": value("error", error),
    "allowed": value("bound", error),
    "set-up s": value("setup_s", ".2f"),
    "first call s": value("first_call_s", ".2f"),
    "time ÷ subject's (p5–p95)": _spread(),
}
_RATE: dict[str, Cell] = {
    "": _what,
    "by": value("contender"),
    "GFLOP": value("gflops", ".4g"),
    "TFLOP/s": value("tflop_s", ".3g"),
    "% of matrix products": value("percent_of_matmul", ".0f"),
    "FLOP per byte": value("flops_per_byte", ".3g"),
    "bound by": value("bound_by"),
    "% of copy": value("percent_of_copy", ".0f"),
    "built MiB": value("built_mib", ".0f"),
    "peak MiB": value("peak_mib", ".0f"),
    "J per image": value("joules_per_image", ".3g"),
}
_RATIO: dict[str, Cell] = {
    "": value("case"),
    "times": lambda r: f"{r['ours']} ÷ {r['theirs']}",
    "result": lambda r: f"skipped: {r['reason']}" if "reason" in r else r["result"],
    "at most": value("goal", ".2f"),
    "median (p5–p95)": _spread(".3f"),
    "with conditioning": value("conditioned", ".3f"),
    "ours ms": value("ours_ms", milliseconds),
    "theirs ms": value("theirs_ms", milliseconds),
}
_OPERATOR: dict[str, Cell] = {
    "operator": value("operator"),
    "shape": value("shape"),
    "dtype": value("dtype"),
    "by": value("contender"),
    "": lambda r: "" if r["status"] == "ok" else _verdict(r),
    "median ms": value("ms.median", milliseconds),
    "rate": lambda r: f"{r['rate']:.3g} {r['unit']}" if "rate" in r else DASH,
    "% of ceiling": value("percent_of_ceiling", ".0f"),
    "× eager": value("speedup_over.eager", ".2f"),
    "× torch.compile": value("speedup_over.compile", ".2f"),
}


def latency_table(report: Report, rows: Sequence[Row]) -> Table:
    settings, kinds = report["settings"], {row["section"] for row in rows}
    notes = [note.format(**{"noise_bound": 0.25, **settings}) for note in _TIMES]
    if "image" in kinds and {"steps", "sampler"} <= settings.keys():
        notes.append(_IMAGE.format(**settings))
    models = report.get("models", [])
    decoded = kinds & {"decode", "image"} and any(m["decoder"] for m in models)
    if decoded and len({row["contender"] for row in rows}) > 1:
        notes.append(_DECODER)
    compared = [m["model"] for m in models if m["config"]["numerics"] == "diffusers"]
    if compared:
        notes.append(_NUMERICS.format(", ".join(compared)))
    return table_of("Times", rows, _LATENCY, *notes, left=3, grouped=1,
                    short=("", "by", "verdict", "median ms"))  # fmt: skip


def rates_table(report: Report, rows: Sequence[Row]) -> Table:
    notes = [_RATES]
    if any("peak_mib" in row for row in rows):
        notes.append("MiB: above what was taken before the backend was built")
    used = [row for row in rows if row["status"] == "ok" and "tflop_s" in row]
    return table_of("What of the machine is used", used, _RATE, *notes, left=2,
                    short=("", "by", "TFLOP/s", "% of matrix products", "bound by"))  # fmt: skip


def ratio_table(ratios: Iterable[Row]) -> Table:
    return table_of("Ratios of times", ratios, _RATIO, left=3, grouped=1,
                    short=("", "times", "result", "median (p5–p95)"))  # fmt: skip


def operator_table(report: Report, rows: Iterable[Row]) -> Table:
    shown = [row for row in rows if row.get("role") != "peer" and ("ms" in row or
             row["status"] not in ("ok", "skipped"))]  # fmt: skip
    return table_of(
        "Operators: % of matrix products (TFLOP/s) or of copying (GB/s)", shown, _OPERATOR, left=5,
        short=("operator", "shape", "by", "", "median ms", "% of ceiling"),
    )  # fmt: skip


def profile_table(report: Report, rows: Iterable[Row]) -> Table:
    table = Table("Where the time of one forward goes", ["", "part", "ms", "share"], left=2)
    for row in rows:
        if row["status"] != "ok":
            table.add(row["case"], _verdict(row))
            continue
        table.add(row["case"], "all", f"{row['ms']['median']:.4g}", "100.0%")
        for part in row["shares"]:
            table.add("", part["part"], f"{part['ms']:.4g}", f"{part['share']:.1%}")
        for part, taken in row["operators_ms"].items():
            table.add("", f"of these, {part} alone in sequence", f"{taken:.4g}")
    return table


def busy_table(report: Report, rows: Iterable[Row]) -> Table:
    columns = {
        "": value("case"), "by": value("contender"), "busy programs": value("neighbours"),
        "idle ms": value("idle_ms", milliseconds), "busy ms": value("busy_ms", milliseconds),
        "busy ÷ idle": _spread(), "result": _verdict,
    }  # fmt: skip
    return table_of("Beside busy programs", rows, columns, left=2, right=1, grouped=1)


def memory_table(report: Report, rows: Iterable[Row]) -> Table:
    def mib(key: str) -> Cell:
        return value(key, lambda count: f"{count / 2**20:.0f}")

    columns = {
        "": value("case"), "by": value("contender"), "result": _verdict,
        "peak ÷ needed": value("value", ".2f"), "at most": value("goal", ".2f"),
        "needed MiB": lambda r: f"{sum(r['needed'].values()) / 2**20:.0f}" if "needed" in r
        else DASH,
        "after load": mib("after_load.total"), "peak in a step": mib("peak_while_running.total"),
        "of it no file": mib("peak_while_running.anonymous"),
        "peak while loading": mib("peak_while_loading.total"),
    }  # fmt: skip
    return table_of("Memory of a step: weights and activations are needed", rows, columns, left=3)


def parity_table(report: Report, rows: Sequence[Row]) -> Table:
    def decibels(key: str) -> Cell:
        """JSON has null both for infinity, of equal images, and for what is not a number."""

        def cell(row: Row) -> str:
            if (psnr := row.get("psnr_db")) is None:
                return DASH
            if psnr[key] is not None and math.isfinite(psnr[key]):
                return f"{psnr[key]:.1f}"
            return "not finite" if psnr["not_finite"] else "equal"

        return cell

    def at(key: Callable[[Row], float | None]) -> Cell:
        return lambda row: "not finite" if key(row) is None else error(key(row) or 0.0)

    columns: dict[str, Cell] = {
        "model": value("model"),
        "backend": value("contender"),
        "N": value("n"),
        "error after step 1": at(lambda r: r["latent_error_by_step"][0]),
        "half way": at(lambda r: r["latent_error_by_step"][len(r["latent_error_by_step"]) // 2]),
        "at the end": at(lambda r: r["final_latent_error"]["mean"]),
        "worst": at(lambda r: r["final_latent_error"]["max"]),
        "PSNR dB, median": decibels("median"),
        "worst dB": decibels("min"),
    }
    notes = [_PARITY]
    if not any(row.get("sets") for row in rows):
        notes.append("--features and --reference-set add |ΔFD|, of enough --samples")
    if any(row.get("interrupted") for row in rows):
        notes.append("INTERRUPTED: N is of what was finished")
    return table_of("Paired with eager float32 (same labels, noise and draws)", rows, columns,
                    *notes, left=2,
                    short=("model", "backend", "N", "at the end", "PSNR dB, median"))  # fmt: skip


def sets_table(report: Report, rows: Iterable[Row]) -> Table:
    """Paired sets: their distances, the N of both sides, and |ΔFD| with its interval."""

    def interval(row: Row) -> str:
        delta = row["sets"].get("absolute_difference")
        if delta is None:
            return DASH
        if delta["low"] is None or delta["high"] is None:
            return f"none: below {LEAST_RESAMPLES} resamples"
        return f"{delta['low']:.3g} to {delta['high']:.3g} ({row['sets']['confidence']:.0%})"

    columns: dict[str, Cell] = {
        "model": value("model"),
        "backend": value("contender"),
        "distance": value("sets.metric"),
        "N": value("sets.n"),
        "to eager's": value("sets.between", ".4g"),
        "reference": value("sets.reference"),
        "its N": lambda r: r["sets"].get("n_reference") or (
            "unknown" if "reference" in r["sets"] else DASH
        ),
        "to reference": value("sets.to_reference", ".4f"),
        "eager's to it": value("sets.eager_to_reference", ".4f"),
        "|Δ|": value("sets.absolute_difference.value", ".3g"),
        "interval": interval,
        "resamples": value("sets.resamples"),
    }  # fmt: skip
    found = [row for row in rows if row.get("sets")]
    return table_of(
        "Paired sets of images, against eager float32's and a reference", found, columns, _SETS,
        left=3, short=("backend", "distance", "N", "to eager's", "|Δ|", "interval"),
    )  # fmt: skip


def distance_table(report: Report, rows: Iterable[Row]) -> Table:
    def counts(row: Row) -> str:
        return "unknown, statistics only" if row.get("n") is None else str(row["n"])

    def remark(row: Row) -> str:
        if row["status"] != "ok":
            return row["reason"]
        width = row.get("fewer_than_features")
        few = f"CAUTION: fewer images than the {width} features: comparable only at this N"
        return few if width else row.get("remark", "")

    def figure(found: float) -> str:  # further digits change from one set of samples to the next
        return f"{found:.3g}" if abs(found) < 1 else f"{found:.4g}"

    columns: dict[str, Cell] = {
        "of": lambda r: NAMES.get(r["case"], r["case"]),
        "figure": value("metric"),
        "value": value("distance", figure),
        "N": counts,
        "its N": lambda r: counts({"n": r["n_reference"]}) if "n_reference" in r
        else DASH,
        "": remark,
    }  # fmt: skip
    settings = report["settings"]
    of = f"Against {settings['reference']}" if "reference" in settings else "Distances"
    sizes = [f"{size[1]}×{size[0]}" for side in settings.get("sets", ()) if (size := side["size"])]
    notes = [f"images of {' and of '.join(sizes)} pixels are compared"] * (len({*sizes}) > 1)
    return table_of(of, rows, columns, *notes, left=2, right=1, grouped=1)


def recognised_table(report: Report, rows: Iterable[Row]) -> Table:
    def worst(row: Row) -> str:
        name = min(row["by_class"], key=row["by_class"].__getitem__)
        return f"{name} {row['by_class'][name]:.1%}"

    columns: dict[str, Cell] = {
        "of": lambda r: NAMES.get(r["case"], r["case"]), "recognised": value("fraction", ".1%"),
        "N": value("n"), "lowest": worst,
    }  # fmt: skip
    return table_of("Images nearest to the mean feature of their own class", rows, columns, right=1)


def scaling_table(report: Report, rows: Sequence[Row]) -> Table:
    columns: dict[str, Cell] = {
        "network": value("case"), "Gflops": value("gmacs", ".3f"),
        "parameters, M": value("parameters", lambda count: f"{count / 1e6:.2f}"),
        "training steps": value("steps"), "distance": value("distance", ".1f"), "N": value("n"),
        "recognised": value("recognised", ".1%"),
    }  # fmt: skip
    ordered = sorted(rows, key=lambda row: (row["steps"], row["gmacs"]))
    return table_of(
        f"{report['settings'].get('metric', 'Distance')} against Gflops", ordered, columns
    )


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    columns: dict[str, Cell] = {
        "": _what, "by": value("contender"), "old ms": value("old_ms", milliseconds),
        "new ms": value("new_ms", milliseconds), "new ÷ old": value("ratio", ".3f"),
        "verdict": value("verdict"),
    }  # fmt: skip
    lost = [f"LOST: {what}" for what in comparison.get("lost", ())]
    return table_of("Against the older report", comparison["rows"], columns, *comparison["notes"],
                    *lost, left=2, right=1, short=("", "by", "new ÷ old", "verdict"))  # fmt: skip


def published_table(report: Report, rows: Iterable[Row]) -> Table:
    """What the paper prints of its models, beside our count and torch's."""

    def total(key: str, unit: float = 1e9, form: str = ".2f") -> Cell:
        return value(f"total.{key}", lambda found: f"{found / unit:{form}}")

    def share(part: str) -> Cell:
        def cell(row: Row) -> str:
            return (
                f"{row['parts'][part]['macs'] / row['total']['macs']:.1%}" if row["parts"] else ""
            )

        return cell

    columns: dict[str, Cell] = {
        "network": value("case"), "px": value("size"),
        "": lambda r: "" if r["status"] == "ok" else _verdict(r),
        "paper M": value("published_million_parameters", ".0f"),
        "ours M": total("trained_parameters", 1e6, ".1f"),
        "paper Gflops": value("published_gflops", ".2f"),
        "ours (MACs)": total("macs"), "torch (MACs)": total("counted_flops", 2e9),
        "true GFLOPs": total("flops"),
        "adaLN": share("adaln"), "attention": share("attention"), "MLP": share("mlp"),
    }  # fmt: skip
    return table_of(
        "What the paper calls Gflops are multiply-adds (MACs), here in 10⁹", rows, columns,
        f"paper: {report['settings']['source']}; parameters without the fixed position table",
        "ours: by formula, but for the U-Net, which torch alone has counted",
        short=("network", "px", "ours M", "paper Gflops", "ours (MACs)", "torch (MACs)"),
    )  # fmt: skip


_TABLES: dict[str, tuple[Callable[[Report, list[Row]], Table], ...]] = {
    "work": (latency_table, rates_table),
    "memory": (memory_table,),
    "busy": (busy_table,),
    "profile": (profile_table,),
    "operator": (operator_table,),
    "cost": (published_table,),
    "parity": (parity_table, sets_table),
    "distance": (distance_table,),
    "recognised": (recognised_table,),
    "scaling": (scaling_table,),
}
"""The tables of each section. "work" stands for all of `WORK`."""
