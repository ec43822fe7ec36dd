"""Tables as data, and how they are shown: on a terminal by rich, and in a page as HTML."""

from __future__ import annotations

import errno
import html
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from dit_engine.io.printable import printable

DASH = "–"
"""A cell without a value."""
_BETWEEN = 3  # columns from one cell to the next, in rich's SIMPLE_HEAD
_UNFOLDED = 100_000  # columns; tables are no wider than they need be


@dataclass
class Table:
    """The first ``left`` columns and the last ``right`` ones are words, the others numbers.

    Cells are text. short: the columns that remain where not all of them fit.
    """

    title: str
    columns: list[str]
    left: int = 1
    right: int = 0
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    short: Sequence[str] = ()

    def add(self, *cells: object) -> None:
        """A row; missing cells at its end are empty."""
        texts = ["" if cell is None else printable(cell) for cell in cells]
        self.rows.append(texts + [""] * (len(self.columns) - len(texts)))

    def words(self, column: int) -> bool:
        """Whether the column is aligned to the left."""
        return column < self.left or column >= len(self.columns) - self.right

    def filled(self) -> Table:
        """Without the columns that are empty, or a dash, in every row."""
        return self._only(
            i for i in range(len(self.columns))
            if not self.rows or any(row[i] not in ("", DASH) for row in self.rows)
        )  # fmt: skip

    def fitting(self, width: int) -> Table:
        """Itself where a row is no wider than ``width``, else with the ``short`` columns alone."""
        if not self.short or self._width(len) <= width:
            return self
        kept = [i for i, name in enumerate(self.columns) if name in self.short]
        narrow = self._only(kept)
        if (left_out := len(self.columns) - len(kept)) > 0:
            narrow.notes = [*self.notes, f"--wide shows the other columns, {left_out} of them"]
        return narrow

    def folds_into(self, width: int) -> bool:
        """Whether it fits without breaking a word or a number."""
        return self._width(_longest_word) <= width

    def widths(self, width: int) -> list[int]:
        """Of each column, in a table that `folds_into` ``width``: what has most room gives way."""
        least = [self._column(i, _longest_word) for i in range(len(self.columns))]
        found = [max(self._column(i, len), len(self.columns[i])) for i in range(len(least))]
        while sum(found) + _BETWEEN * len(found) > width:
            i = max(range(len(found)), key=lambda i: found[i] - least[i])
            found[i] -= 1
        return found

    def _column(self, column: int, words: Callable[[str], int]) -> int:
        """words: the width that a text in a column of words needs."""
        needs = words if self.words(column) else len
        cells = [needs(row[column]) for row in self.rows]
        return max([_longest_word(self.columns[column]), *cells])

    def _width(self, words: Callable[[str], int]) -> int:
        return sum(self._column(i, words) + _BETWEEN for i in range(len(self.columns)))

    def _only(self, kept: Iterable[int]) -> Table:
        kept = list(kept)
        words = [i for i in kept if self.words(i)]
        left = sum(i < self.left for i in kept)
        return Table(
            self.title, [self.columns[i] for i in kept], left, len(words) - left,
            [[row[i] for i in kept] for row in self.rows], self.notes, self.short,
        )  # fmt: skip

    def listed(self) -> list[str]:
        """A row as a sentence; a first cell that is empty is that of the row above."""
        lines, first = [], ""
        for row in self.rows:
            first = row[0] or first
            cells = zip(self.columns[1:], row[1:], strict=True)
            lines.append(f"{first}: " + ", ".join(f"{h} {c}".strip() for h, c in cells if c))
        return lines

    def shown(self) -> Table:
        """A copy without empty columns; its title, column names and notes are `printable`."""
        table = self.filled()
        table.title, table.columns = printable(table.title), [*map(printable, table.columns)]
        table.notes = [*map(printable, table.notes)]
        return table

    def html(self) -> str:
        return self.shown()._html()

    def _html(self) -> str:
        def cells(tag: str, texts: list[str]) -> str:
            return "".join(
                f"<{tag}{'' if self.words(i) else ' class=number'}>{html.escape(t)}</{tag}>"
                for i, t in enumerate(texts)
            )

        head = f"<thead><tr>{cells('th', self.columns)}</tr></thead>\n" if any(self.columns) else ""
        body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in self.rows)
        notes = "".join(f"<p class=note>{html.escape(note)}</p>\n" for note in self.notes)
        return (
            f"<h2>{html.escape(self.title)}</h2>\n<div class=scroll><table>\n"
            f"{head}<tbody>\n{body}</tbody>\n"
            f"</table></div>\n{notes}"
        )


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)


def require_rich() -> None:
    """Raise a one-line ImportError where the tables could not be shown."""
    try:
        import rich  # noqa: F401
    except ImportError:
        raise ImportError("rich is not installed: pip install 'dit-engine[bench]'") from None


def output_width() -> int | None:
    """Columns of the output: COLUMNS if it is set, else the terminal's; None where there is no
    terminal, and a line may be as long as it need be."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    if not sys.stdout.isatty():
        return None
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except OSError:
        return None


def narrower_than(columns: int) -> bool:
    width = output_width()
    return width is not None and width < columns


def fold(text: str, width: int | None = None) -> str:
    """Lines that are wider than the output are continued on the next one, between words."""
    width = width or output_width()
    if width is None:
        return text
    return "\n".join(
        line if len(line) <= width else textwrap.fill(
            line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
        for line in text.split("\n")
    )  # fmt: skip


def show(tables: Sequence[Table], width: int | None = None, wide: bool = False) -> None:
    """Print the tables; ``width`` in columns is `output_width` unless given.

    A table that is wider is shown without all but its ``short`` columns, words on several lines;
    one that is too wide even so becomes a list. wide: everything, each row one line. No number is
    ever broken in two.
    """
    require_rich()
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable

    if wide:
        width = _UNFOLDED
    elif width is None:
        width = output_width() or _UNFOLDED

    class Pipeable(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError(errno.EPIPE, "standard output is closed")  # rich would exit

    console = Pipeable(width=width, highlight=False, markup=False, emoji=False)
    for whole in map(Table.shown, tables):
        table = whole.fitting(width)
        if not table.folds_into(width):
            notes = [f"  {note}" for note in table.notes]
            lines = ["", table.title, *table.listed(), *notes, ""]
            console.print(fold("\n".join(lines), width), soft_wrap=True)
            continue
        widths = table.widths(width)
        shown = RichTable(title=table.title, title_justify="left", box=SIMPLE_HEAD,
                          title_style="bold", pad_edge=False,
                          show_header=any(table.columns))  # fmt: skip
        for i, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if table.words(i) else "right",
                             overflow="fold", width=widths[i])  # fmt: skip
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
        for note in table.notes:
            console.print(f"  {note}")
        console.print()
