"""A report as tables for people: what it ran on, costs, times, peers, comparisons."""

from __future__ import annotations

import math
from typing import Any

from dit_bench.load import warning
from dit_bench.quality.paired import LEAST_RESAMPLES
from dit_bench.schema import PARTS
from dit_bench.show.tables import Table

_WHAT = {
    "forward": "one forward", "step": "one guided step", "decode": "VAE decode",
    "image": "whole generation",
}  # fmt: skip

_CHECKED = "error: relative, against eager float32 on the same weights and inputs, before timing"
_GENERATION_CHECKED = (
    "error of a whole generation: of one step of it, which eager float32 takes again from the same "
    "latents, or of its decoding: whichever is nearest to what is allowed there"
)
_PER_SECOND = (
    "images/s: how often a second this is done for one image; a whole generation's are the images "
    "that one gets"
)
_DECODERS = "lean alone has a decoder of its own, other backends decode with torch"
_NUMERICS = (
    "{}: measured with numerics 'diffusers', the function that all of these peers compute; paired "
    "and shown samples are of the model's own"
)
_NOISY = (
    "noisy: p95 − p5 above {:.0%} of the median, or n below 5; set-up and first call (which "
    "compiles) are in no other figure; n: samples, of which a short call's are medians of visits"
)
_WHOLE = "a whole generation: {steps} steps of {sampler}, guided, with the VAE where there is one"


def report_tables(report: dict[str, Any]) -> list[Table]:
    """Everything that the report holds, in reading order."""
    tables = [machine_table(report), cost_table(report)]
    if report["measurements"]:
        tables += [latency_table(report), rates_table(report)]
    if report["parity"]:
        tables.append(parity_table(report))
        if any("sets" in row for found in report["parity"] for row in found["subjects"]):
            tables.append(distance_table(report))
    if "comparison" in report:
        tables.append(comparison_table(report["comparison"]))
    if "operators" in report:
        tables.append(operator_table(report["operators"]))
    if report["interrupted"]:
        why = f" ({report['failure']})" if "failure" in report else ""
        tables[-1].notes.append(f"INTERRUPTED{why}: what is missing above was not measured")
    return tables


def machine_table(report: dict[str, Any]) -> Table:
    hardware, settings = report["environment"]["hardware"], report["settings"]
    table = Table("Measured on", ["", ""], left=2)
    for key in ("cpu", "gpu", "platform", "python"):
        if hardware.get(key):
            table.add(key, hardware[key])
    count = hardware.get("cpu_count")
    table.add("device", f"{settings['device']}, {settings['threads']} of {count} CPU threads")
    table.add(
        "versions", ", ".join(f"{k} {v}" for k, v in report["environment"]["versions"].items())
    )
    table.add("instruction sets", " ".join(report["environment"]["instruction_sets"]) or "unknown")
    if (ceilings := report["ceilings"]) is not None:
        rates = [f"{k} {v:.3g}" for k, v in ceilings["matmul_tflop_s"].items()]
        when = f"the best of those {ceilings['measured']} the run"
        size = ceilings["matmul_size"]
        table.add("matrix products", f"{', '.join(rates)} TFLOP/s ({size}²; {when})")
        for kind, reason in ceilings["missing"].items():
            table.add("", f"{kind}: {reason}")
        table.add("copy", f"{ceilings['copy_gb_s']:.3g} GB/s (reads and writes)")
    if report.get("energy"):
        table.add("energy", report["energy"])
    if (load := report["load_average"]) is not None:
        table.add("load average", f"{load:.2f} at the start")
    if (others := report.get("other_load")) is not None:
        table.add("other programs", f"used {others:.2f} processors while times were taken")
    if (busy := warning(report)) is not None:
        table.notes.append(busy)
    return table


def cost_table(report: dict[str, Any]) -> Table:
    columns = ["model", "px", "weights", "parameters, M", "GMACs", *PARTS, "true GFLOPs",
               "torch counts", "VAE decoder, GMACs"]  # fmt: skip
    table = Table("Cost of one image's forward; parts in GMACs (the paper's Gflops)", columns)
    table.short = ("model", "px", "parameters, M", "GMACs", "VAE decoder, GMACs")
    for model in report["models"]:
        total, decoder = model["cost"]["total"], model["decoder"]
        parts = [f"{model['cost']['parts'][part]['macs'] / 1e9:.3g}" for part in PARTS]
        weights = "random" if model["weights"] == "random" else "trained"
        table.add(
            model["model"], model["size"] or "–", weights, f"{total['parameters'] / 1e6:.4g}",
            f"{total['macs'] / 1e9:.4g}", *parts, f"{total['flops'] / 1e9:.4g}",
            f"{total['counted_flops'] / 1e9:.4g}",
            "–" if decoder is None else f"{decoder['macs'] / 1e9:.4g}",
        )  # fmt: skip
    return table


def latency_table(report: dict[str, Any]) -> Table:
    settings = report["settings"]
    columns = ["", "images", "by", "verdict", "median ms", "p5", "p95", "n", "images/s", "error",
               "allowed", "set-up s", "first call s", "time ÷ subject's (p5–p95)"]  # fmt: skip
    title = f"Latency of {settings['backend']} {settings['precision']}, and of its peers"
    table = Table(title, columns, left=4, short=("", "images", "by", "verdict", "median ms"))
    last = None
    for row in report["measurements"]:
        key = (row["model"], row["what"], row["images"])
        name = f"{row['model']} {_WHAT[row['what']]}" if key != last else ""
        images = row["images"] if key != last else ""
        last = key
        if row["status"] != "ok":
            reason = row["reason"]
            status = row["status"].upper() if row["status"] == "wrong" else row["status"]
            table.add(name, images, row["name"], f"{status}: {reason}")
            continue
        ms = row["ms"]
        table.add(
            name, images, row["name"], row.get("verdict") or ("noisy" if row["noisy"] else ""),
            _ms(ms["median"]), _ms(ms["p5"]), _ms(ms["p95"]), ms["n"], f"{row['images_s']:.3g}",
            _error(row["error"]) if "error" in row else "–",
            _error(row["bound"]) if "bound" in row else "–",
            f"{row['setup_s']:.2f}", f"{row['first_call_s']:.2f}",
            _ratio(row),
        )  # fmt: skip
    kinds = {row["what"] for row in report["measurements"]}
    table.notes += [_CHECKED, _NOISY.format(settings["noise_bound"])]
    if "image" in kinds:
        table.notes += [_WHOLE.format(**settings), _GENERATION_CHECKED]
    table.notes.append(_PER_SECOND)
    decoded = bool(kinds & {"decode", "image"}) and any(m["decoder"] for m in report["models"])
    if decoded and len({row["name"] for row in report["measurements"]}) > 1:
        table.notes.append(_DECODERS)
    compared = [m["model"] for m in report["models"] if m["config"]["numerics"] == "diffusers"]
    if compared:
        table.notes.append(_NUMERICS.format(", ".join(compared)))
    return table


def rates_table(report: dict[str, Any]) -> Table:
    columns = ["", "images", "by", "GFLOP", "TFLOP/s", "% of matrix products", "FLOP a byte",
               "bound by", "% of copy", "built MiB", "peak MiB", "J an image"]  # fmt: skip
    table = Table("What of the machine is used", columns, left=3)
    table.short = ("", "images", "by", "TFLOP/s", "% of matrix products", "bound by")
    for row in report["measurements"]:
        if row["status"] != "ok" or "tflop_s" not in row:
            continue

        def number(key: str, form: str = ".3g", row: dict[str, Any] = row) -> str:
            return format(row[key], form) if key in row else "–"

        table.add(
            f"{row['model']} {_WHAT[row['what']]}", row["images"], row["name"],
            number("gflops", ".4g"), number("tflop_s"), number("percent_of_matmul", ".0f"),
            number("flops_per_byte"), row.get("bound_by", "–"), number("percent_of_copy", ".0f"),
            number("built_mib", ".0f"), number("peak_mib", ".0f"), number("joules_per_image"),
        )  # fmt: skip
    table.notes.append(
        "true FLOPs of the whole network, conditioning included; FLOP a byte and % of copy: of one "
        "pass over the weights that every step needs, which the conditioning's are not"
    )
    if any("peak_mib" in row for row in report["measurements"]):
        table.notes.append("MiB: above what was taken before the backend was built")
    return table


def parity_table(report: dict[str, Any]) -> Table:
    columns = ["model", "backend", "N", "error after step 1", "half way", "at the end", "worst",
               "PSNR dB, median", "worst dB"]  # fmt: skip
    table = Table("Paired with eager float32 (same labels, noise and draws)", columns, left=2)
    table.short = ("model", "backend", "N", "at the end", "PSNR dB, median")
    for found in report["parity"]:
        for row in found["subjects"]:
            steps, final = row["latent_error_by_step"], row["final_latent_error"]
            psnr = row.get("psnr_db")
            decibels = ["–"] * 2
            if psnr is not None:
                decibels = [_db(psnr[key], psnr["not_finite"]) for key in ("median", "min")]
            table.add(
                found["model"], f"{row['backend']} {row['precision']}", found["n"],
                _error(steps[0]), _error(steps[len(steps) // 2]), _error(final["mean"]),
                _error(final["max"]), *decibels,
            )  # fmt: skip
    table.notes.append(
        "errors of the latents, relative, the mean over N but for the worst; images decoded in "
        "float32 by the same VAE: what differs is the transformer"
    )
    if not any("sets" in row for found in report["parity"] for row in found["subjects"]):
        table.notes.append("--features and --reference-set add |ΔFD|, of enough --samples")
    if any(found["interrupted"] for found in report["parity"]):
        table.notes.append("INTERRUPTED: N is of what was finished")
    return table


def distance_table(report: dict[str, Any]) -> Table:
    """Paired sets: their distances, N of both sides, and |ΔFD| with its bootstrap's interval."""
    columns = ["model", "backend", "distance", "N", "to eager's", "reference", "its N",
               "to reference", "eager's to it", "|Δ|", "interval", "resamples"]  # fmt: skip
    table = Table("Paired sets of images, against eager float32's and a reference", columns, left=3)
    table.short = ("backend", "distance", "N", "to eager's", "|Δ|", "interval")
    for found in report["parity"]:
        for row in found["subjects"]:
            if (sets := row.get("sets")) is None:
                continue
            cells: list[object] = [
                found["model"], f"{row['backend']} {row['precision']}", sets["metric"], sets["n"],
                f"{sets['between']:.4g}",
            ]  # fmt: skip
            if "reference" in sets:
                delta = sets["absolute_difference"]
                cells += [
                    sets["reference"], sets["n_reference"] or "unknown",
                    f"{sets['to_reference']:.4f}", f"{sets['eager_to_reference']:.4f}",
                    f"{delta['value']:.3g}", _interval(sets), sets["resamples"],
                ]  # fmt: skip
            table.add(*cells)
    table.notes.append(
        "|Δ|: of the distances to the reference; the interval is a bootstrap's over pairs of one "
        "label and noise; where 0 lies in it, no difference was shown"
    )
    return table


def comparison_table(comparison: dict[str, Any]) -> Table:
    columns = ["", "images", "by", "old ms", "new ms", "new ÷ old", "verdict"]
    table = Table("Against the older report", columns, left=3, right=1)
    table.short = ("", "images", "by", "new ÷ old", "verdict")
    for row in comparison["rows"]:
        table.add(
            f"{row['model']} {_WHAT[row['what']]}", row["images"], row["name"], _ms(row["old_ms"]),
            _ms(row["new_ms"]), f"{row['ratio']:.3f}", row["verdict"],
        )  # fmt: skip
    table.notes += comparison["notes"]
    table.notes += [f"LOST: {what}" for what in comparison.get("lost", ())]
    return table


def operator_table(operators: dict[str, Any]) -> Table:
    columns = ["operator", "shape", "dtype", "by", "median ms", "rate", "% of ceiling"]
    table = Table("Operators: % of matrix products (TFLOP/s) or of copying (GB/s)", columns, left=4)
    table.short = ("operator", "shape", "by", "median ms", "% of ceiling")
    for row in operators["operators"]:
        if row.get("status") != "ok" or "rate" not in row:
            continue
        percent = row["percent_of_ceiling"]
        table.add(
            row["operator"], row["shape"], row["dtype"], row["impl"], _ms(row["ms"]["median"]),
            f"{row['rate']:.3g} {row['unit']}", "–" if percent is None else f"{percent:.0f}",
        )  # fmt: skip
    return table


def _error(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.1e}"


def _db(value: float | None, not_finite: int) -> str:
    """JSON has null both for infinity, which is of equal images, and for what is no number."""
    if value is not None and math.isfinite(value):
        return f"{value:.1f}"
    return "not finite" if not_finite else "equal"


def _interval(sets: dict[str, Any]) -> str:
    delta = sets["absolute_difference"]
    if delta["low"] is None or delta["high"] is None:
        return f"none: below {LEAST_RESAMPLES} resamples"
    return f"{delta['low']:.3g} to {delta['high']:.3g} ({sets['confidence']:.0%})"


def _ms(value: float) -> str:
    return f"{value:.4g}" if value < 1e4 else f"{value:.0f}"


def _ratio(row: dict[str, Any]) -> str:
    if "ratio" not in row:
        return ""
    ratio = row["ratio"]
    return f"{ratio['median']:.2f} ({ratio['p5']:.2f}–{ratio['p95']:.2f})"
