"""How the values of a report's rows become the cells of a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dit_bench.report import Report, Row
from dit_bench.show.tables import DASH, Table

Cell = Callable[[Row], object]
Maker = Callable[[Report, list[Row]], Table]


def value(key: str, form: str | Callable[[Any], str] = "") -> Cell:
    """A cell with the value at ``key``, such as "ms.median"; a dash if there is none."""

    def cell(row: Row) -> object:
        found: Any = row
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is None:
            return DASH
        return form(found) if callable(form) else format(found, form)

    return cell


def time_ms(key: str) -> Cell:
    return value(key, lambda ms: f"{ms:.4g}" if ms < 1e4 else f"{ms:.0f}")


def error(key: str) -> Cell:
    return value(key, lambda found: f"{found:.1e}" if math.isfinite(found) else "not finite")


def ratio(form: str) -> Cell:
    """The median of "ratio" with its 5 % and 95 % quantiles, if it has them."""

    def shown(found: Mapping[str, float | None]) -> str:
        ends = [f"{end:{form}}" for end in (found.get("p5"), found.get("p95")) if end is not None]
        return f"{found['median']:{form}}" + (f" ({'–'.join(ends)})" if ends else "")

    return value("ratio", shown)


def verdict(row: Row) -> str:
    """What is said about a row: why it has no figures, or what its figures show."""
    if row["status"] != "ok":
        status = row["status"].upper() if row["status"] == "wrong" else row["status"]
        return f"{status}: {row['reason']}"
    return row.get("verdict") or ("noisy" if row.get("noisy") else row.get("result", ""))


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
    """One row for each row of a report. The first ``grouped`` cells are empty where they repeat."""
    table = Table(title, list(columns), left, right, notes=list(notes), short=short)
    last: list[object] = []
    for row in rows:
        cells = [cell(row) for cell in columns.values()]
        first = cells[:grouped]
        table.add(*([""] * grouped if first == last else first), *cells[grouped:])
        last = first
    return table


def grid(
    title: str,
    rows: Iterable[Row],
    subject: Mapping[str, Cell],
    cells: Callable[[Row], Mapping[str, object]],
    *notes: str,
    short: Sequence[str] = (),
) -> Table:
    """One row for each subject, with a column for each name among the ``cells`` of its rows."""
    found: dict[tuple[object, ...], dict[str, object]] = {}
    for row in rows:
        found.setdefault(tuple(cell(row) for cell in subject.values()), {}).update(cells(row))
    columns = list(dict.fromkeys(name for line in found.values() for name in line))
    table = Table(title, [*subject, *columns], notes=list(notes), short=short)
    for first, line in found.items():
        table.add(*first, *(line.get(name, DASH) for name in columns))
    return table
