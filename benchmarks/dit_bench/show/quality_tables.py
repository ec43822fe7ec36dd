"""The tables of how good images are, and of what the paper's networks cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from dit_bench.quality.paired import LEAST_RESAMPLES
from dit_bench.report import Report, Row
from dit_bench.show.cells import Cell, Maker, grid, table_of, value, verdict
from dit_bench.show.tables import DASH, Table

_SETS_OF = {
    "floor": "held-out images, the other half (the floor of this N)",
    "vae_reconstruction": "held-out images through the VAE (the best that a DiT could do)",
    "generated": "generated images", "held_out": "held-out images",
}  # fmt: skip
_PARITY = (
    "errors of the latents are relative, and the mean over N except for the worst; images are "
    "decoded in float32 by the same VAE, so that only the transformer differs"
)
_SETS = (
    "|Δ|: of the distances to the reference; the interval is from a bootstrap over pairs of one "
    "label and noise; if 0 lies in it, no difference was shown"
)


def parity_table(report: Report, rows: Sequence[Row]) -> Table:
    def decibels(key: str) -> Cell:
        """JSON has null both for infinity, of equal images, and for what is not a number."""

        def shown(psnr: Row) -> str:
            if psnr[key] is not None and math.isfinite(psnr[key]):
                return f"{psnr[key]:.1f}"
            return "not finite" if psnr["not_finite"] else "equal"

        return value("psnr_db", shown)

    def error(found: float | None) -> str:
        return f"{found:.1e}" if found is not None and math.isfinite(found) else "not finite"

    steps = "latent_error_by_step"
    columns: dict[str, Cell] = {
        "model": value("model"), "backend": value("contender"), "N": value("n"),
        "error after step 1": value(steps, lambda found: error(found[0])),
        "half way": value(steps, lambda found: error(found[len(found) // 2])),
        "at the end": lambda row: error(row["final_latent_error"]["mean"]),
        "worst": lambda row: error(row["final_latent_error"]["max"]),
        "PSNR dB, median": decibels("median"), "worst dB": decibels("min"),
    }  # fmt: skip
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

    def interval(sets: Row) -> str:
        if (delta := sets.get("absolute_difference")) is None:
            return DASH
        if delta["low"] is None or delta["high"] is None:
            return f"none: below {LEAST_RESAMPLES} resamples"
        return f"{delta['low']:.3g} to {delta['high']:.3g} ({sets['confidence']:.0%})"

    def reference_count(sets: Row) -> str:
        return str(sets.get("n_reference") or ("unknown" if "reference" in sets else DASH))

    columns: dict[str, Cell] = {
        "model": value("model"), "backend": value("contender"), "distance": value("sets.metric"),
        "N": value("sets.n"), "to eager's": value("sets.between", ".4g"),
        "reference": value("sets.reference"), "reference N": value("sets", reference_count),
        "to reference": value("sets.to_reference", ".4f"),
        "eager's to it": value("sets.eager_to_reference", ".4f"),
        "|Δ|": value("sets.absolute_difference.value", ".3g"),
        "interval": value("sets", interval), "resamples": value("sets.resamples"),
    }  # fmt: skip
    found = [row for row in rows if row.get("sets")]
    return table_of(
        "Paired sets of images, against eager float32's and a reference", found, columns, _SETS,
        left=3, short=("backend", "distance", "N", "to eager's", "|Δ|", "interval"),
    )  # fmt: skip


def distance_table(report: Report, rows: Iterable[Row]) -> Table:
    def count(key: str) -> Cell:
        return lambda row: DASH if key not in row else row[key] or (
            0 if row[key] == 0 else "unknown, statistics only"
        )  # fmt: skip

    def figure(found: float) -> str:  # further digits change from one set of samples to the next
        return f"{found:.3g}" if abs(found) < 1 else f"{found:.4g}"

    def remark(row: Row) -> str:
        if row["status"] != "ok":
            return row["reason"]
        if (width := row.get("fewer_than_features")) is None:
            return row.get("remark", "")
        return f"CAUTION: fewer images than the {width} features: comparable only at this N"

    columns: dict[str, Cell] = {
        "of": lambda r: _SETS_OF.get(r["case"], r["case"]), "figure": value("metric"),
        "value": value("distance", figure), "N": count("n"), "reference N": count("n_reference"),
        "": remark,
    }  # fmt: skip
    settings = report["settings"]
    title = f"Against {settings['reference']}" if "reference" in settings else "Distances"
    sizes = [f"{size[1]}×{size[0]}" for side in settings.get("sets", ()) if (size := side["size"])]
    notes = [f"images of {' and of '.join(sizes)} pixels are compared"] * (len({*sizes}) > 1)
    return table_of(title, rows, columns, *notes, left=2, right=1, grouped=1)


def recognised_table(report: Report, rows: Iterable[Row]) -> Table:
    def lowest(by_class: dict[str, float]) -> str:
        name = min(by_class, key=by_class.__getitem__)
        return f"{name} {by_class[name]:.1%}"

    columns: dict[str, Cell] = {
        "of": lambda r: _SETS_OF.get(r["case"], r["case"]), "recognised": value("fraction", ".1%"),
        "N": value("n"), "lowest": value("by_class", lowest),
    }  # fmt: skip
    return table_of("Images nearest to the mean feature of their own class", rows, columns, right=1)


def scaling_table(report: Report, rows: Iterable[Row]) -> Table:
    metric = report["settings"].get("metric", "Distance")

    def cells(row: Row) -> dict[str, object]:
        after = f"after {row['steps']} steps"
        return {f"{metric} {after}": value("distance", ".1f")(row),
                f"recognised {after}": value("recognised", ".1%")(row)}  # fmt: skip

    subject: dict[str, Cell] = {
        "network": value("case"), "Gflops": value("gmacs", ".3f"),
        "parameters, M": value("parameters", lambda count: f"{count / 1e6:.2f}"), "N": value("n"),
    }  # fmt: skip
    ordered = sorted(rows, key=lambda row: (row["gmacs"], row["steps"]))
    return grid(f"{metric} against Gflops", ordered, subject, cells)


def published_table(report: Report, rows: Iterable[Row]) -> Table:
    """What the paper prints of its models, beside our count and torch's."""

    def total(key: str, unit: float = 1e9, form: str = ".2f") -> Cell:
        return value(f"total.{key}", lambda found: f"{found / unit:{form}}")

    def share(part: str) -> Cell:
        def cell(row: Row) -> str:
            parts = row.get("parts")
            return f"{parts[part]['macs'] / row['total']['macs']:.1%}" if parts else ""

        return cell

    columns: dict[str, Cell] = {
        "network": value("case"), "px": value("size"),
        "": lambda r: "" if r["status"] == "ok" else verdict(r),
        "paper M": value("published_million_parameters", ".0f"),
        "ours M": total("trained_parameters", 1e6, ".1f"),
        "paper Gflops": value("published_gflops", ".2f"), "ours (MACs)": total("macs"),
        "torch (MACs)": total("counted_flops", 2e9), "true GFLOPs": total("flops"),
        "adaLN": share("adaln"), "attention": share("attention"), "MLP": share("mlp"),
    }  # fmt: skip
    return table_of(
        "What the paper calls Gflops are multiply-adds (MACs), here in 10⁹", rows, columns,
        f"paper: {report['settings']['source']}; parameters without the fixed position table",
        "ours: by formula; VAE and U-Net are counted by torch alone",
        short=("network", "px", "ours M", "paper Gflops", "ours (MACs)", "torch (MACs)"),
    )  # fmt: skip


QUALITY_TABLES: dict[str, tuple[Maker, ...]] = {
    "cost": (published_table,),
    "parity": (parity_table, sets_table),
    "distance": (distance_table,),
    "recognised": (recognised_table,),
    "scaling": (scaling_table,),
}
"""The tables of each section."""
