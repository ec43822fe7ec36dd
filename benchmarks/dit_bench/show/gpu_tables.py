"""The tables of a GPU run, which fit on one page; its JSON has every figure."""

from __future__ import annotations

from collections.abc import Iterable

from dit_bench.report import Report, Row
from dit_bench.show.speed_tables import WHAT, verdict, what
from dit_bench.show.tables import Table, cell_of, grid

MOST_LOST = 14
"""Rows that are shown of what failed."""


def gpu_tables(report: Report) -> list[Table]:
    """A GPU run in few lines: times, operators with many rows and with few, and failures last."""
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
    for row in rows:
        if row["section"] == "check" and row["status"] == "ok":
            told = row.get("remark") or f"right, error {cell_of(row, 'error:error')}"
            head.add(f"{row['case']}, {row['contender']}", told)
        elif row["section"] == "kernels" and row["status"] == "ok":
            longest = ", ".join(f"{p['share']:.0%} {p['part'][:24]}" for p in row["shares"][:3])
            told = f"kernels: {row['launches']}, {row['ms']['median']:.4g} ms; {longest}"
            head.add(f"{row['case']}, a step of {row['contender']}", told)
    errors = [row["error_over_reference"] for row in rows if row["status"] == "ok"
              and row["section"] == "operator" and row["role"] == "subject"]  # fmt: skip
    if errors:
        head.add("operators", f"right: {len(errors)}, errors at most {max(errors):.2f} × torch's")
    work = [row for row in rows if row["section"] in WHAT]
    times = grid("Medians in ms", work, {"": what}, _time_cells)
    lost = Table("Not right or not measured", ["", "by", ""])
    bad = [row for row in rows if row["status"] in ("wrong", "failed", "late")]
    skipped = [row for row in rows if row["status"] == "skipped" and row.get("role") == "subject"]
    for row in (*skipped, *bad)[-MOST_LOST:]:
        lost.add(row["case"], row["contender"], verdict(row)[:120])
    if len(skipped) + len(bad) > MOST_LOST:
        lost.notes.append(f"and {len(skipped) + len(bad) - MOST_LOST} more, which the JSON has")
    return [head, times, _gpu_operators(rows), lost]


def _clocks(report: Report) -> str:
    """The lowest and highest of what was sampled while parts were measured."""
    states = [row["device_state"] for row in report["rows"] if row.get("device_state")]
    if not states:
        return f"not sampled: {report['machine'].get('sampled_by', 'nothing')}"
    spans = (
        f"{min(s[key]['min'] for s in states):.0f}–{max(s[key]['max'] for s in states):.0f} {unit}"
        for key, unit in (("sm_mhz", "MHz"), ("power_w", "W"), ("celsius", "°C"))
    )
    slowed = list(dict.fromkeys(reason for s in states for reason in s["throttled"]))
    return f"SM {', '.join(spans)}, slowed by {', '.join(slowed) or 'nothing'}"


def _time_cells(row: Row) -> dict[str, object]:
    if row["status"] != "ok":
        return {row["contender"]: row["status"]}
    shown = f"{cell_of(row, 'ms.median:ms')}{' noisy' * row['noisy']}"
    if "percent_of_matmul" in row:
        shown += f" ({row['percent_of_matmul']:.0f}%)"
    return {row["contender"]: shown}


def _gpu_operators(rows: Iterable[Row]) -> Table:
    """One line for an operator and its widths: 64 rows (32 images, 8 of a decoder) and 2 (1)."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        if row["section"] == "operator" and "ms" in row:
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
