"""A report (`dit_bench.report`) as tables for people, in reading order."""

from __future__ import annotations

from collections.abc import Callable

from dit_bench.load import warning
from dit_bench.report import WORK, Report, Row
from dit_bench.show import quality_tables as quality
from dit_bench.show import speed_tables as speed
from dit_bench.show.gpu_tables import gpu_tables
from dit_bench.show.tables import Table

TABLES: dict[str, tuple[Callable[[Report, list[Row]], Table], ...]] = {
    "work": (speed.latency_table, speed.rates_table),  # of all sections in `WORK`
    "memory": (speed.memory_table,), "busy": (speed.busy_table,),
    "profile": (speed.profile_table,), "operator": (speed.operator_table,),
    "cost": (quality.published_table,), "parity": (quality.parity_table, quality.sets_table),
    "distance": (quality.distance_table,), "recognised": (quality.recognised_table,),
    "scaling": (quality.scaling_table,),
}  # fmt: skip


def report_tables(report: Report) -> list[Table]:
    """Everything that the report holds. The first table describes the machine and the settings. Of
    a GPU run, only what fits on one page: its JSON has the rest."""
    if report["kind"] == "gpu":
        tables = [table for table in gpu_tables(report) if table.rows]
        tables[-1].notes += interrupted(report)
        return tables
    rows: dict[str, list[Row]] = {}
    for row in report["rows"]:
        rows.setdefault("work" if row["section"] in WORK else row["section"], []).append(row)
    tables = [machine_table(report)]
    if report.get("models"):
        tables.append(speed.cost_table(report["models"]))
    if report.get("ratios"):
        tables.append(speed.ratio_table(report["ratios"]))
    for section, makers in TABLES.items():
        if section in rows:
            tables += [make(report, rows[section]) for make in makers]
    if "comparison" in report:
        tables.append(speed.comparison_table(report["comparison"]))
    tables = [table for table in tables if table.rows]
    tables[-1].notes += interrupted(report)
    return tables


def interrupted(report: Report) -> list[str]:
    """A note that the report is not complete; none if it is."""
    why = f" ({report['failure']})" if "failure" in report else ""
    note = f"INTERRUPTED{why}: what is missing above was not measured"
    return [] if report["complete"] else [note]


def machine_table(report: Report) -> Table:
    machine, table = report["machine"], Table("Measured on", ["", ""])
    for key in ("cpu", "gpu", "platform", "python"):
        if machine.get(key):
            table.add(key, machine[key])
    count = machine.get("cpu_count") or "unknown"
    table.add("device", f"{machine['device']}, {machine['threads']} of {count} CPU threads")
    table.add("versions", ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v))
    table.add("instruction sets", " ".join(machine["instruction_sets"]) or "unknown")
    if (ceilings := report.get("ceilings")) is not None:
        rates = ", ".join(f"{k} {v:.3g}" for k, v in ceilings["matmul_tflop_s"].items())
        size, measured = ceilings["matmul_size"], ceilings.get("measured")
        when = f"; the best of those {measured} the run" if measured else ""
        table.add("matrix products", f"{rates} TFLOP/s ({size}²{when})")
        for kind, reason in ceilings["missing"].items():
            table.add("", f"{kind}: {reason}")
        table.add("copy", f"{ceilings['copy_gb_s']:.4g} GB/s (reads and writes)")
    if (load := report.get("load_average")) is not None:
        table.add("load average", f"{load:.2f} at the start")
    if (others := report.get("other_load")) is not None:
        table.add("other programs", f"used {others:.2f} processors while times were taken")
    settings = {k: v for k, v in report["settings"].items() if not isinstance(v, dict | list)}
    table.add("settings", ", ".join(f"{k} {v}" for k, v in settings.items()))
    if (busy := warning(report)) is not None:
        table.notes.append(busy)
    return table
