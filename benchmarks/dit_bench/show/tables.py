"""Tables as data, and their forms: text, Markdown and HTML."""

from __future__ import annotations

import html
import math
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from dit_bench.report import Row
from dit_engine.io.printable import markdown_text, printable, say

DASH = "–"
"""A cell without a value."""
_GAP = "   "
_UNFOLDED = 100_000  # columns; tables are only as wide as they need to be

Cell = str | Callable[[Row], object]
"""A function of the row; or where the value is, what it is divided by and how it is written, as in
"ms.median:ms" and "cost.total.macs/1e9:.4g". The last is a format of Python, or one of `FORMS`."""


@dataclass
class Table:
    """Rows of text. short: how many columns are shown on a terminal that is too narrow for all."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    short: int = 0

    def add(self, *cells: object) -> None:
        self.rows.append([printable(cell) for cell in cells])

    def words(self) -> list[bool]:
        """For each column, whether it is aligned to the left: few cells begin with a digit."""
        return [
            2 * sum(re.match(r"-?\d", row[i]) is not None for row in self.rows)
            <= sum(row[i] not in ("", DASH) for row in self.rows)
            for i in range(len(self.columns))
        ]

    def filled(self) -> Table:
        """A copy with printable text, without columns that are empty or a dash in every row."""
        columns = range(len(self.columns))
        return self._only([i for i in columns if {row[i] for row in self.rows} - {"", DASH}])

    def _only(self, kept: Sequence[int]) -> Table:
        return Table(
            printable(self.title), [printable(self.columns[i]) for i in kept],
            [[row[i] for i in kept] for row in self.rows], [*map(printable, self.notes)],
            sum(i < self.short for i in kept),
        )  # fmt: skip

    def text(self, width: int = _UNFOLDED) -> str:
        """The table in lines of about ``width`` characters, none of which breaks a number in two.
        If not all columns fit, only the first ones are shown, with words on several lines."""
        table = self.filled()
        widths = table._widths(width, fold=not self.short)
        if self.short and sum(widths) + len(_GAP) * (len(widths) - 1) > width:
            if left_out := len(table.columns) - table.short:
                table.notes.append(f"--wide shows the other columns, {left_out} of them")
            table = table._only(range(table.short))
            widths = table._widths(width, fold=True)
        title, *notes = (
            textwrap.fill(line, width, subsequent_indent="    ")
            for line in (table.title, *(f"  {note}" for note in table.notes))
        )
        return "\n".join([title, *table._lines(widths), *notes, ""])

    def _widths(self, width: int, fold: bool) -> list[int]:
        """The widths of the columns; the widest ones are narrowed. fold: words may be folded."""
        least, found = [], []
        for i, words in enumerate(self.words()):
            cells = [row[i] for row in self.rows]
            needs = _longest_word if fold and words else len
            least.append(max(1, _longest_word(self.columns[i]), *map(needs, cells)))
            whole = max(len(self.columns[i]), *map(len, cells))
            found.append(max(least[i], min(whole, width)))
        while sum(found) + len(_GAP) * (len(found) - 1) > width and found != least:
            found[max(range(len(found)), key=lambda i: found[i] - least[i])] -= 1
        return found

    def _lines(self, widths: list[int]) -> list[str]:
        words, lines = self.words(), list[str]()
        for row in [self.columns, *self.rows]:
            parts = [textwrap.wrap(cell, width, break_on_hyphens=False)
                     for cell, width in zip(row, widths, strict=True)]  # fmt: skip
            for cells in zip_longest(*parts, fillvalue=""):
                aligned = (
                    cell.ljust(width) if left else cell.rjust(width)
                    for cell, width, left in zip(cells, widths, words, strict=True)
                )
                lines.append(_GAP.join(aligned).rstrip())
            if row is self.columns and any(row):
                lines.append("─" * (sum(widths) + len(_GAP) * (len(widths) - 1)))
        return lines

    def html(self) -> str:
        """The table in HTML, with all of its text escaped."""
        table = self.filled()
        kinds = ["" if words else " class=number" for words in table.words()]

        def line(tag: str, texts: list[str]) -> str:
            cells = (f"<{tag}{kind}>{html.escape(text)}</{tag}>"
                     for kind, text in zip(kinds, texts, strict=True))  # fmt: skip
            return f"<tr>{''.join(cells)}</tr>\n"

        head = f"<thead>{line('th', table.columns)}</thead>\n" if any(table.columns) else ""
        body = "".join(line("td", row) for row in table.rows)
        notes = "".join(f"<p class=note>{html.escape(note)}</p>\n" for note in table.notes)
        return (
            f"<h2>{html.escape(table.title)}</h2>\n<div class=scroll><table>\n"
            f"{head}<tbody>\n{body}</tbody>\n</table></div>\n{notes}"
        )

    def markdown(self) -> str:
        """The table in Markdown, with all of its text escaped: title, rows, and notes as a list.

        A column with the same text in every row becomes a part of the title.
        """
        table = self.filled()
        last = range(1, len(table.columns)) if len(table.rows) > 1 else ()
        same = [i for i in last if len({row[i] for row in table.rows}) == 1]
        common = ", ".join(f"{table.columns[i]} {table.rows[0][i]}" for i in same)
        title = f"**{markdown_text(table.title)}**" + f" ({markdown_text(common)})" * bool(common)
        table = table._only([i for i in range(len(table.columns)) if i not in same])
        head, *rows = ["| " + " | ".join(map(markdown_text, row)) + " |"
                       for row in (table.columns, *table.rows)]  # fmt: skip
        rule = f"|{'|'.join('---' if words else '---:' for words in table.words())}|"
        notes = [f"- {markdown_text(note)}" for note in table.notes]
        return "\n".join([title, "", head, rule, *rows, "", *notes, *[""] * bool(notes)])


def _longest_word(text: str) -> int:
    """The length of the longest word; of a word that may be broken, at most 20."""
    return min(20, max(map(len, text.split()), default=0))


def show(tables: Iterable[Table], wide: bool = False) -> None:
    """Print the tables in the width of COLUMNS or of the terminal; without both, there is no limit.
    wide: every column, and each row on one line."""
    width = _UNFOLDED if wide else shutil.get_terminal_size((_UNFOLDED, 0)).columns
    for table in tables:
        say(table.text(width or _UNFOLDED))


def _ratio(form: str) -> Callable[[Mapping[str, float | None]], str]:
    """The median with its 5 % and 95 % quantiles, if it has them."""

    def shown(found: Mapping[str, float | None]) -> str:
        ends = [f"{end:{form}}" for end in (found.get("p5"), found.get("p95")) if end is not None]
        return f"{found['median']:{form}}" + (f" ({'–'.join(ends)})" if ends else "")

    return shown


FORMS: dict[str, Callable[[Any], str]] = {
    "ms": lambda ms: f"{ms:.4g}" if ms < 1e4 else f"{ms:.0f}",
    "error": lambda error: f"{error:.1e}" if math.isfinite(error) else "not finite",
    "ratio.2f": _ratio(".2f"),
    "ratio.3f": _ratio(".3f"),
}


def value_at(row: Row, place: str) -> Any:
    """The value at a place such as "ratio.median" of a row; None if there is none."""
    found: Any = row
    for part in place.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def cell_of(row: Row, cell: Cell) -> object:
    if callable(cell):
        return cell(row)
    place, _, form = cell.partition(":")
    place, _, unit = place.partition("/")
    found = value_at(row, place)
    if found is None:
        return DASH
    found = found / float(unit) if unit else found
    return FORMS[form](found) if form in FORMS else format(found, form)


def table_of(
    title: str, rows: Iterable[Row], columns: Mapping[str, Cell], *notes: str,
    short: int = 0, grouped: bool = False,
) -> Table:  # fmt: skip
    """One row for each row of a report. grouped: a first cell that repeats is left empty."""
    table = Table(title, list(columns), notes=list(notes), short=short)
    last: object = None
    for row in rows:
        first, *cells = [cell_of(row, cell) for cell in columns.values()]
        table.add("" if grouped and first == last else first, *cells)
        last = first
    return table


def grid(
    title: str, rows: Iterable[Row], subject: Mapping[str, Cell],
    cells: Callable[[Row], Mapping[str, object]], short: int = 0,
) -> Table:  # fmt: skip
    """One row for each subject, with a column for each name among the ``cells`` of its rows."""
    found: dict[tuple[object, ...], dict[str, object]] = {}
    for row in rows:
        first = tuple(cell_of(row, cell) for cell in subject.values())
        found.setdefault(first, {}).update(cells(row))
    columns = list(dict.fromkeys(name for line in found.values() for name in line))
    table = Table(title, [*subject, *columns], short=short)
    for first, line in found.items():
        table.add(*first, *(line.get(name, DASH) for name in columns))
    return table
