"""Markdown of a `dit_bench.gpu` report, for documents."""

from __future__ import annotations

from typing import Any

from dit_bench.escaped import of_escaped
from dit_bench.gpu_report import rows_with_status
from dit_bench.gpu_table import quickest_forms

Values = dict[str, Any]
Row = dict[str, Any]


@of_escaped
def gpu_table(report: Values) -> str:
    """A line a model and backend: ms a forward by batch, images a second; then what else there is.

    Raises ValueError for a report in which no forward was timed.
    """
    forwards = quickest_forms(report.get("forwards", []))
    made = [r for r in report.get("generate", []) if "images_per_s" in r]
    if not forwards:
        raise ValueError("the report has no timed forward: nothing to show")
    cells: dict[tuple[str, str], dict[tuple[str, int], str]] = {}
    for rows, kind in ((forwards, "ms"), (made, "images_per_s")):
        for r in rows:
            text = f"{r['ms']['median']:.3g}" if kind == "ms" else f"{r[kind]:.3g}"
            cells.setdefault((r["model"], r["contender"]), {})[kind, r["batch"]] = text
    columns = [("ms", b) for b in sorted({r["batch"] for r in forwards})]
    columns += [("images_per_s", b) for b in sorted({r["batch"] for r in made})]
    names = {"ms": "ms, B={}", "images_per_s": "images/s, N={}"}
    lines = [
        "| model | backend | " + " | ".join(names[k].format(b) for k, b in columns) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for (model, contender), found in cells.items():
        values = " | ".join(found.get(column, "–") for column in columns)
        lines.append(f"| {model} | {contender} | {values} |")
    operators = _operators(report)
    notes = [*_steps(report), *_decoders(report), *_pixels(report), _checks(report),
             _machine(report)]  # fmt: skip
    return "\n".join([*lines, "", *operators, *(f"- {note}" for note in notes)]) + "\n"


def _operators(report: Values) -> list[str]:
    """A table of our implementations at the timed shapes, empty where none was timed."""
    rows = [r for r in report.get("operators", []) if "ms" in r and not r.get("opponent")]
    if not rows:
        return []
    lines = [
        "| operator | shape | by | µs | of the ceiling | × eager | × torch.compile |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        percent = r["percent_of_ceiling"]
        over = [r["speedup_over"].get(other) for other in ("eager", "compile")]
        values = [
            f"{1000 * r['ms']['median']:.3g}",
            "–" if percent is None else f"{percent:.0f} %",
            *("–" if value is None else f"{value:.2f}" for value in over),
        ]
        lines.append(f"| `{r['operator']}` | {r['shape']} | {r['impl']} | {' | '.join(values)} |")
    return [*lines, ""]


def _steps(report: Values) -> list[str]:
    made = [r for r in report.get("generate", []) if "images_per_s" in r]
    note = "B rows a forward, in the quickest of call, CUDA graph and fused sampler step"
    if made:
        steps, scale = made[0]["steps"], made[0]["guidance_scale"]
        note += f"; N images to latents, dpm++, {steps} steps, guidance {scale:g}"
    return [note + "."]


def _decoders(report: Values) -> list[str]:
    return [
        f"VAE decode, {r['pixels']} px, batch {r['batch']}, {r['contender']}: "
        f"{r['ms']['median']:.3g} ms."
        for r in report.get("decode", [])
        if "ms" in r
    ]


def _pixels(report: Values) -> list[str]:
    return [
        f"{r['model']} to pixels, {r['batch']} images, {r['contender']}: "
        f"{r['images_per_s']:.3g} images/s."
        for r in report.get("pixels", [])
        if "images_per_s" in r
    ]


def _checks(report: Values) -> str:
    """What failed is said beside what was measured, and who was not there by name."""
    failed, skipped = (rows_with_status(report, s) for s in ("failed", "skipped"))
    checked = [r for k in ("operators", "decode", "forwards") for r in report.get(k, [])
               if "error" in r and not r.get("opponent")]  # fmt: skip
    passed = sum(r["status"] == "ok" for r in checked)
    note = f"Checked before timing: {passed} of {len(checked)} within their error budgets"
    if failed:
        names = dict.fromkeys(_name(r) for r in failed)
        note += f"; failed: {', '.join(names)}"
    absent = dict.fromkeys(_name(r) for r in skipped if r["reason"] != "time budget")
    if absent:
        note += f"; not run there: {', '.join(absent)}"
    if not report.get("complete"):
        note += "; the run did not end in time"
    return note + "."


def _name(row: Row) -> str:
    keys = ("contender", "impl", "section")
    return str(next((row[k] for k in keys if k in row), "?"))


def _machine(report: Values) -> str:
    values, ceilings = report.get("environment", {}), report.get("ceilings")
    packages = {k: v for k, v in (values.get("packages") or {}).items() if v}
    versions = {"driver": values.get("driver"), "CUDA": values.get("cuda"),
                "torch": values.get("torch"), **packages}  # fmt: skip
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    text = f"{values.get('gpu') or values.get('cpu')}; {known}"
    if ceilings:
        rates = [f"{k} {v:.3g} TFLOP/s" for k, v in ceilings["matmul_tflop_s"].items()]
        rates.append(f"copies {ceilings['copy_gb_s']:.4g} GB/s")
        text += f". At best it reached {', '.join(rates)}"
    return text + "."
