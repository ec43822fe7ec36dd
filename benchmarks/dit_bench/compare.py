"""A report beside an older one: ratios of times, and which of them are regressions.

A regression is a time that grew by more than the noise of both runs explains: its 5 % quantile lies
above the old 95 % quantile, and the medians differ by more than `LEAST`. If one of the two times is
noisy, or its run was not to be quoted, a regression must be far beyond any noise: a 5 % quantile of
`FAR` times the old 95 % quantile, or a median of `VERY_FAR` times the old one. Times of another
machine are shown, but not judged.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dit_bench.load import busy_row, not_quoted
from dit_bench.machine import same_processor
from dit_bench.report import Report, Row, read

LEAST = 0.03
FAR, VERY_FAR = 3.0, 10.0
NOISY = 3
"""Exit code where nothing is a regression and something is too noisy to tell."""
_KEY = ("section", "case", "contender")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("old", type=Path, metavar="OLD", help="the --json of an older run")
    add("new", type=Path, metavar="NEW", help="that of a newer one")
    add("--strict", action="store_true", help="exit code 1 for whatever cannot be judged")
    add("--wide", action="store_true", help="all columns, wider than the terminal")


def run(arguments: argparse.Namespace) -> int:
    from dit_bench.show.speed_tables import comparison_table
    from dit_bench.show.tables import show

    comparison = compare_reports(read(arguments.new), read(arguments.old))
    show([comparison_table(comparison)], wide=arguments.wide)
    return exit_code(comparison, arguments.strict)


def compare_reports(new: Report, old: Report) -> dict[str, Any]:
    """JSON-ready: "rows", one for each time that both have; "notes" on how the machines differ; and
    "lost": contenders with an old time but no new one, because they are wrong, not run or left out.

    A row holds the section, case and contender, both medians, "ratio" (new over old) and "verdict":
    "regression", "quicker", "no difference shown", "noisy" or "another machine".

    Raises ValueError if the reports have no time in common.
    """

    def by_key(rows: Iterable[Row]) -> dict[tuple[Any, ...], Row]:
        return {tuple(row[key] for key in _KEY): row for row in rows}

    before = by_key(row for row in old["rows"] if row["status"] == "ok" and "ms" in row)
    after = by_key(new["rows"])
    notes = []
    for key in ("cpu", "gpu", "threads", "device"):
        now, then = new["machine"].get(key), old["machine"].get(key)
        if not (same_processor(now, then) if key == "cpu" else now == then):
            notes.append(f"{key}: {then!r} then, {now!r} now")
    sure = not_quoted(new) is None and not_quoted(old) is None
    one, other = new["settings"], old["settings"]
    same_sampling = all(one.get(key) == other.get(key) for key in ("steps", "sampler"))
    rows, lost, left_out = [], [], []
    for key, was in before.items():
        title = f"{was['case']}, {was['section']}, {was['contender']}"
        if (row := after.get(key)) is None:
            left_out.append(f"{title}: not measured now")
        elif row["status"] != "ok":
            lost.append(f"{title}: {row['status']} now ({row['reason']})")
        elif "ms" in row and (row["section"] != "image" or same_sampling):
            ratio = row["ms"]["median"] / was["ms"]["median"]
            rows.append(
                {name: row[name] for name in _KEY}
                | {"old_ms": was["ms"]["median"], "new_ms": row["ms"]["median"], "ratio": ratio}
                | {"verdict": "another machine" if notes else _verdict(row, was, ratio, sure)}
            )
    if not rows and not lost:
        raise ValueError("the two reports have no measurement in common")
    lost += left_out
    return {"rows": rows, "notes": notes, "lost": lost, "complete": new["complete"], "least": LEAST}


def exit_code(comparison: dict[str, Any], strict: bool = False) -> int:
    """1 for a regression, `NOISY` if some time was too noisy to judge, else 0.

    strict: also 1 for everything that was not judged: on another machine, lost, or interrupted.
    """
    verdicts = {row["verdict"] for row in comparison["rows"]}
    unjudged = verdicts & {"noisy", "another machine"} or comparison["lost"]
    if "regression" in verdicts or (strict and (unjudged or not comparison["complete"])):
        return 1
    return NOISY if "noisy" in verdicts else 0


def _verdict(new: Row, old: Row, ratio: float, sure: bool) -> str:
    if new["ms"] == old["ms"]:  # the same run
        return "no difference shown"
    # The median serves for both quantiles if a report has none.
    (low, high), (old_low, old_high) = (
        (ms.get("p5", ms["median"]), ms.get("p95", ms["median"])) for ms in (new["ms"], old["ms"])
    )
    if not sure or any(row.get("noisy") or busy_row(row) for row in (new, old)):
        far = low > FAR * old_high or new["ms"]["median"] > VERY_FAR * old_high
        return "regression" if far else "noisy"
    if low > old_high and ratio > 1 + LEAST:
        return "regression"
    if high < old_low and ratio < 1 - LEAST:
        return "quicker"
    return "no difference shown"
