"""Tables of the quality of images, and of the cost of the paper's networks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from dit_bench.quality.paired import LEAST_RESAMPLES
from dit_bench.report import Report, Row
from dit_bench.show.speed_tables import verdict
from dit_bench.show.tables import DASH, Cell, Table, cell_of, grid, table_of, value_at

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


def _set_of(row: Row) -> str:
    return _SETS_OF.get(row["case"]) or row["case"]


def _error(found: float | None) -> str:
    return f"{found:.1e}" if found is not None and math.isfinite(found) else "not finite"


def parity_table(report: Report, rows: Sequence[Row]) -> Table:
    def decibels(row: Row, key: str) -> str:
        """JSON has null both for infinity (equal images) and for NaN."""
        if (psnr := row.get("psnr_db")) is None:
            return DASH
        if psnr[key] is not None and math.isfinite(psnr[key]):
            return f"{psnr[key]:.1f}"
        return "not finite" if psnr["not_finite"] else "equal"

    def half_way(row: Row) -> str:
        steps = row["latent_error_by_step"]
        return _error(steps[len(steps) // 2])

    columns: dict[str, Cell] = {
        "model": "model", "backend": "contender", "N": "n",
        "error at the end": lambda row: _error(row["final_latent_error"]["mean"]),
        "PSNR dB, median": lambda row: decibels(row, "median"),
        "error after step 1": lambda row: _error(row["latent_error_by_step"][0]),
        "half way": half_way, "worst": lambda row: _error(row["final_latent_error"]["max"]),
        "worst dB": lambda row: decibels(row, "min"),
    }  # fmt: skip
    notes = [_PARITY]
    if any(row.get("interrupted") for row in rows):
        notes.append("INTERRUPTED: N is of what was finished")
    done = [row for row in rows if row["status"] == "ok"]
    title = "Paired with eager float32 (same labels, noise and draws)"
    return table_of(title, done, columns, *notes, short=5)


def sets_table(report: Report, rows: Iterable[Row]) -> Table:
    """Paired sets: their distances, the N of both sides, and |ΔFD| with its interval."""

    def interval(row: Row) -> str:
        if (delta := row["sets"].get("absolute_difference")) is None:
            return DASH
        if delta["low"] is None or delta["high"] is None:
            return f"none: below {LEAST_RESAMPLES} resamples"
        return f"{delta['low']:.3g} to {delta['high']:.3g}"

    def reference_count(row: Row) -> object:
        return row["sets"].get("n_reference") or ("unknown" if "reference" in row["sets"] else DASH)

    columns: dict[str, Cell] = {
        "backend": "contender", "distance": "sets.metric", "N": "sets.n",
        "to eager's": "sets.between:.4g", "|Δ|": "sets.absolute_difference.value:.3g",
        "interval": interval, "confidence": "sets.confidence:.0%", "model": "model",
        "reference": "sets.reference", "reference N": reference_count,
        "to reference": "sets.to_reference:.4f", "eager's to it": "sets.eager_to_reference:.4f",
        "resamples": "sets.resamples",
    }  # fmt: skip
    found = [row for row in rows if row.get("sets")]
    title = "Paired sets of images, against eager float32's and a reference"
    return table_of(title, found, columns, _SETS, short=6)


def distance_table(report: Report, rows: Iterable[Row]) -> Table:
    def count(row: Row, key: str) -> object:
        found = row.get(key, DASH)
        return "unknown, statistics only" if found is None else found

    def figure(row: Row) -> str:  # further digits change from one set of samples to the next
        if (found := row.get("distance")) is None:
            return DASH
        return f"{found:.3g}" if abs(found) < 1 else f"{found:.4g}"

    def remark(row: Row) -> str:
        if row["status"] != "ok":
            return row["reason"]
        if (width := row.get("fewer_than_features")) is None:
            return row.get("remark", "")
        return f"CAUTION: fewer images than the {width} features: comparable only at this N"

    columns: dict[str, Cell] = {
        "of": _set_of, "figure": "metric", "value": figure, "N": lambda row: count(row, "n"),
        "reference N": lambda row: count(row, "n_reference"), "": remark,
    }  # fmt: skip
    settings = report["settings"]
    title = f"Against {settings['reference']}" if "reference" in settings else "Distances"
    sizes = [f"{size[1]}×{size[0]}" for side in settings.get("sets", ()) if (size := side["size"])]
    notes = [f"images of {' and of '.join(sizes)} pixels are compared"] * (len({*sizes}) > 1)
    return table_of(title, rows, columns, *notes, grouped=True)


def recognised_table(report: Report, rows: Iterable[Row]) -> Table:
    def lowest(row: Row) -> str:
        name, share = min(row["by_class"].items(), key=lambda item: item[1])
        return f"{name} {share:.1%}"

    columns: dict[str, Cell] = {
        "of": _set_of, "recognised": "fraction:.1%", "N": "n", "lowest": lowest,
    }  # fmt: skip
    done = [row for row in rows if row["status"] == "ok"]
    return table_of("Images nearest to the mean feature of their own class", done, columns)


def scaling_table(report: Report, rows: Iterable[Row]) -> Table:
    metric = report["settings"].get("metric", "Distance")

    def cells(row: Row) -> dict[str, object]:
        after = f"after {row['steps']} steps"
        return {f"{metric} {after}": cell_of(row, "distance:.1f"),
                f"recognised {after}": cell_of(row, "recognised:.1%")}  # fmt: skip

    subject: dict[str, Cell] = {
        "network": "case", "Gflops": "gmacs:.3f", "parameters, M": "parameters/1e6:.2f", "N": "n",
    }  # fmt: skip
    done = [row for row in rows if row["status"] == "ok"]
    ordered = sorted(done, key=lambda row: (row["gmacs"], row["steps"]))
    return grid(f"{metric} against Gflops", ordered, subject, cells)


def published_table(report: Report, rows: Iterable[Row]) -> Table:
    """The cost that the paper gives for its models, beside our count and torch's."""

    def share(part: str) -> Cell:
        def cell(row: Row) -> str:
            macs = value_at(row, f"parts.{part}.macs")
            return DASH if macs is None else f"{macs / row['total']['macs']:.1%}"

        return cell

    columns: dict[str, Cell] = {
        "network": "case", "px": "size", "paper Gflops": "published_gflops:.2f",
        "ours (MACs)": "total.macs/1e9:.2f", "torch (MACs)": "total.counted_flops/2e9:.2f",
        "": lambda row: "" if row["status"] == "ok" else verdict(row),
        "paper M": "published_million_parameters:.0f",
        "ours M": "total.trained_parameters/1e6:.1f", "true GFLOPs": "total.flops/1e9:.2f",
        "adaLN": share("adaln"), "attention": share("attention"), "MLP": share("mlp"),
    }  # fmt: skip
    return table_of(
        "What the paper calls Gflops are multiply-adds (MACs), here in 10⁹", rows, columns,
        f"paper: {report['settings'].get('source')}; parameters without the fixed position table",
        "ours: by formula; VAE and U-Net are counted by torch alone",
        short=6,
    )  # fmt: skip
