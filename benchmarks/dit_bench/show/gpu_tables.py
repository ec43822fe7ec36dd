"""The tables of a GPU run, which fit on one page; its JSON has every figure."""

from __future__ import annotations

import re
from collections.abc import Iterable

from dit_bench.report import Report, Row
from dit_bench.show.speed_tables import WHAT, verdict
from dit_bench.show.tables import Table, cell_of, grid

MOST_LOST, MOST_LOST_OF_A_CHECK = 10, 30
"""The number of failed or skipped rows that are shown."""
WIDTH = 150
"""Characters of a reason that are shown: half from its beginning, half from its end, which says
where the error occurred."""
RAGGED = " T=250 "
"""Cases that are shown only if they fail."""


def gpu_tables(report: Report) -> list[Table]:
    """The machine and the checks, times, operators with many and with few rows, then failures."""
    machine, rows = report["machine"], report["rows"]
    head = Table("Measured on", ["", ""])
    facts = {"Python": machine.get("python"), **machine["versions"]}
    facts["driver"] = (machine.get("cuda") or {}).get("driver_version")
    shown = ("Python", "torch", "triton", "driver")
    head.add(machine.get("gpu") or machine["cpu"],
             ", ".join(f"{name} {facts[name]}" for name in shown if facts.get(name)))  # fmt: skip
    if (ceilings := report.get("ceilings")) is not None:
        rates = ", ".join(f"{k} {v:.4g}" for k, v in ceilings["matmul_tflop_s"].items())
        head.add("ceilings", f"products {rates} TFLOP/s, copy {ceilings['copy_gb_s']:.4g} GB/s, "
                 f"{ceilings.get('measured', '')} this run")  # fmt: skip
    head.add("clocks", _clocks(report))
    good = [row for row in rows if row["status"] == "ok"]
    for row in good:
        if row["section"] == "check":
            told = row.get("remark") or f"right, error {cell_of(row, 'error:error')}"
            head.add(f"{row['case']}, {row['contender']}", told)
        elif row["section"] == "kernels" and row["precision"] == "bf16":
            longest = ", ".join(f"{p['share']:.0%} {p['part'][:24]}" for p in row["shares"][:3])
            told = f"kernels: {row['launches']}, {row['ms']['median']:.4g} ms; {longest}"
            head.add(f"{row['case']}, a step of {row['contender']}", told)
    ours = [row for row in good if row["section"] == "operator" and row["role"] == "subject"]
    if ours:
        worst = max(row["error_over_reference"] for row in ours)
        head.add("operators", f"right: {len(ours)}, errors at most {worst:.2f} × torch's")
    lost = Table("Not right or not measured", ["", "by", ""])
    bad = [row for row in rows if row["status"] in ("wrong", "failed", "late")]
    skipped = [row for row in rows if row["status"] == "skipped" and row.get("role") == "subject"]
    most = MOST_LOST if ceilings is not None else MOST_LOST_OF_A_CHECK
    # Rows with the same reason are one line, which names the first of them: after an illegal memory
    # access, everything that follows fails.
    alike: dict[str, list[Row]] = {}
    for row in (*skipped, *bad):
        alike.setdefault(re.sub(r" \([^()]*\.py:[^()]*\)$", "", verdict(row)), []).append(row)
    for first, *others in [*alike.values()][-most:]:
        told = verdict(first)
        told = told if len(told) <= WIDTH else f"{told[: WIDTH // 2]} … {told[-WIDTH // 2 :]}"
        if others:
            names = (each["contender"].rpartition("::")[2] if "::" in each["contender"]
                     else f"{each['case']} {each['contender']}" for each in others)  # fmt: skip
            told += f"; {len(others)} more: {', '.join(names)}"[: 2 * WIDTH]
        lost.add(first["case"], first["contender"], told)
    if len(alike) > most:
        lost.notes.append(f"and {len(alike) - most} other reasons in the JSON")
    return [head, _times(good), _operators(good), lost]


def _times(rows: Iterable[Row]) -> Table:
    """One line per model and kind of work; a cell has a contender's times for all batch sizes."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["section"] in WHAT:
            name = f"{row['model']}: {WHAT[row['section']]}"
            told = f"{row['images']}: {row['ms']['median']:.4g}{' noisy' * row['noisy']}"
            if "percent_of_matmul" in row:
                told += f" ({row['percent_of_matmul']:.0f}%)"
            line = lines.setdefault(name, {"": name})
            before = line.get(row["contender"])
            line[row["contender"]] = told if before is None else f"{before}, {told}"
    return grid("Number of images: median in ms (% of the ceiling of products)", lines.values(),
                {"": ""}, lambda line: {k: v for k, v in line.items() if k})  # fmt: skip


def _clocks(report: Report) -> str:
    """The lowest and highest clock, power and temperature that were sampled during the parts."""
    states = [row["device_state"] for row in report["rows"] if row.get("device_state")]
    if not states:
        return f"not sampled: {report['machine'].get('sampled_by', 'nothing')}"
    spans = (
        f"{min(s[key]['min'] for s in states):.0f}–{max(s[key]['max'] for s in states):.0f} {unit}"
        for key, unit in (("sm_mhz", "MHz"), ("power_w", "W"), ("celsius", "°C"))
    )
    slowed = list(dict.fromkeys(reason for s in states for reason in s["throttled"]))
    return f"SM {', '.join(spans)}, slowed by {', '.join(slowed) or 'nothing'}"


def _operators(rows: Iterable[Row]) -> Table:
    """One line per operator and width, with 64 rows (32 images; 8 for the decoder) and 2 (1)."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        if row["section"] == "operator" and "ms" in row and RAGGED not in row["case"]:
            cases.setdefault(row["case"], []).append(row)
    lines: dict[str, dict[str, object]] = {}
    for found in cases.values():
        ours, other = (
            min((row for row in found if row["role"] == role), default=None,
                key=lambda row: row["ms"]["median"])
            for role in ("subject", "peer")
        )  # fmt: skip
        if ours is None:
            continue
        told = f"{ours['ms']['median']:.4g} {ours['contender']}"
        if ours.get("percent_of_ceiling") is not None:
            told += f", {ours['percent_of_ceiling']:.0f}%"
        if other is not None:
            told += f"; {other['contender']} {other['ms']['median']:.4g}"
        name = f"{ours['operator']} {ours['shape'].partition(' ')[2]}"  # without the number of rows
        line = lines.setdefault(name, {"operator": name})
        line["few rows" if "many rows" in line else "many rows"] = told
    return grid("Operators: ms of the quickest of ours, % of its ceiling; the quickest other",
                lines.values(), {"": "operator"},
                lambda line: {k: v for k, v in line.items() if k != "operator"})  # fmt: skip
