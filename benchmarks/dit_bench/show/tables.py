"""Tables as data, and how they are written: on a terminal (by rich), in Markdown and in HTML."""

from __future__ import annotations

import errno
import html
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from dit_engine.io.printable import markdown_text, printable

DASH = "–"
"""A cell without a value."""
_BETWEEN = 3  # columns between two cells, in rich's SIMPLE_HEAD
_UNFOLDED = 100_000  # columns; tables are only as wide as they need to be


@dataclass
class Table:
    """The first ``left`` columns and the last ``right`` ones hold words, the others numbers.

    Cells are text. short: the columns that remain if not all of them fit.
    """

    title: str
    columns: list[str]
    left: int = 1
    right: int = 0
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    short: Sequence[str] = ()

    def add(self, *cells: object) -> None:
        """Add a row. None is an empty cell, and so are those that are missing at the end."""
        texts = ["" if cell is None else printable(cell) for cell in cells]
        self.rows.append(texts + [""] * (len(self.columns) - len(texts)))

    def words(self, column: int) -> bool:
        """Whether the column is aligned to the left."""
        return column < self.left or column >= len(self.columns) - self.right

    def filled(self) -> Table:
        """A copy without the columns that are empty or a dash in every row, all text printable."""
        kept = [
            i
            for i in range(len(self.columns))
            if not self.rows or any(row[i] not in ("", DASH) for row in self.rows)
        ]
        return self._only(kept)

    def fitting(self, width: int) -> Table:
        """This table if its rows fit into ``width``, else one with the ``short`` columns alone."""
        if not self.short or self._width(len) <= width:
            return self
        kept = [i for i, name in enumerate(self.columns) if name in self.short]
        narrow = self._only(kept)
        if (left_out := len(self.columns) - len(kept)) > 0:
            narrow.notes.append(f"--wide shows the other columns, {left_out} of them")
        return narrow

    def folds_into(self, width: int) -> bool:
        """Whether it fits without breaking a word or a number."""
        return self._width(_longest_word) <= width

    def widths(self, width: int) -> list[int]:
        """Column widths of a table that `folds_into` ``width``; the widest ones give way first."""
        least = [self._column(i, _longest_word) for i in range(len(self.columns))]
        found = [max(self._column(i, len), len(self.columns[i])) for i in range(len(least))]
        while sum(found) + _BETWEEN * len(found) > width:
            i = max(range(len(found)), key=lambda i: found[i] - least[i])
            found[i] -= 1
        return found

    def _column(self, column: int, words: Callable[[str], int]) -> int:
        """The column's width. words: the width that a text needs in a column of words."""
        needs = words if self.words(column) else len
        return max(
            [_longest_word(self.columns[column]), *(needs(row[column]) for row in self.rows)]
        )

    def _width(self, words: Callable[[str], int]) -> int:
        return sum(self._column(i, words) + _BETWEEN for i in range(len(self.columns)))

    def _only(self, kept: Iterable[int]) -> Table:
        kept = list(kept)
        left = sum(i < self.left for i in kept)
        right = sum(self.words(i) for i in kept) - left
        return Table(
            printable(self.title), [printable(self.columns[i]) for i in kept], left, right,
            [[row[i] for i in kept] for row in self.rows], [*map(printable, self.notes)],
            self.short,
        )  # fmt: skip

    def listed(self) -> list[str]:
        """Each row as a sentence; an empty first cell stands for that of the row above."""
        lines, first = [], ""
        for row in self.rows:
            first = row[0] or first
            cells = zip(self.columns[1:], row[1:], strict=True)
            lines.append(f"{first}: " + ", ".join(f"{h} {c}".strip() for h, c in cells if c))
        return lines

    def html(self) -> str:
        """The table in HTML, with all of its text escaped."""
        table = self.filled()

        def cells(tag: str, texts: list[str]) -> str:
            return "".join(
                f"<{tag}{'' if table.words(i) else ' class=number'}>{html.escape(t)}</{tag}>"
                for i, t in enumerate(texts)
            )

        names = table.columns
        head = f"<thead><tr>{cells('th', names)}</tr></thead>\n" if any(names) else ""
        body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in table.rows)
        notes = "".join(f"<p class=note>{html.escape(note)}</p>\n" for note in table.notes)
        return (
            f"<h2>{html.escape(table.title)}</h2>\n<div class=scroll><table>\n"
            f"{head}<tbody>\n{body}</tbody>\n</table></div>\n{notes}"
        )

    def markdown(self) -> str:
        """The table in Markdown, with all of its text escaped: title, rows, and notes as a list.

        A column that holds the same in every row joins the title. Notes on options are left out.
        """
        table = self.filled()
        last = range(1, len(table.columns)) if len(table.rows) > 1 else ()
        same = [i for i in last if len({row[i] for row in table.rows}) == 1]
        common = ", ".join(f"{table.columns[i]} {table.rows[0][i]}" for i in same)
        title = f"**{markdown_text(table.title)}**" + f" ({markdown_text(common)})" * bool(common)
        table = table._only(i for i in range(len(table.columns)) if i not in same)
        rules = ["---" if table.words(i) else "---:" for i in range(len(table.columns))]
        lines = ["| " + " | ".join(map(markdown_text, row)) + " |" for row in table.rows]
        head = ["| " + " | ".join(map(markdown_text, table.columns)) + " |", f"|{'|'.join(rules)}|"]
        notes = [f"- {markdown_text(note)}" for note in table.notes if not note.startswith("--")]
        return "\n".join([title, "", *head, *lines, "", *notes, *[""] * bool(notes)])


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)


def require_rich() -> None:
    """Raise a one-line ImportError if the tables could not be shown."""
    try:
        import rich  # noqa: F401
    except ImportError:
        raise ImportError("rich is not installed: pip install 'dit-engine[bench]'") from None


def output_width() -> int | None:
    """Columns of the output: COLUMNS if it is set, else the terminal's. None if it is no terminal:
    lines may then be of any length."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    if not sys.stdout.isatty():
        return None
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except OSError:
        return None


def fold(text: str, width: int | None = None) -> str:
    """``text`` with lines that are wider than the output continued on the next one, at a space."""
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
    """Print the tables in ``width`` columns, or in those of the output (`output_width`).

    A table that is wider is shown with its ``short`` columns only and with words on several lines;
    one that is still too wide becomes a list. No number is ever broken in two. wide: show every
    column, and each row on one line.
    """
    require_rich()
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable

    width = _UNFOLDED if wide else width or output_width() or _UNFOLDED

    class Pipeable(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError(errno.EPIPE, "standard output is closed")  # rich would exit

    console = Pipeable(width=width, highlight=False, markup=False, emoji=False)
    for whole in tables:
        table = whole.filled().fitting(width)
        notes = [f"  {note}" for note in table.notes]
        if not table.folds_into(width):
            lines = ["", table.title, *table.listed(), *notes, ""]
            console.print(fold("\n".join(lines), width), soft_wrap=True)
            continue
        shown = RichTable(title=table.title, title_justify="left", box=SIMPLE_HEAD,
                          title_style="bold", pad_edge=False,
                          show_header=any(table.columns))  # fmt: skip
        for i, (column, columns) in enumerate(zip(table.columns, table.widths(width), strict=True)):
            shown.add_column(column, justify="left" if table.words(i) else "right",
                             overflow="fold", width=columns)  # fmt: skip
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
        for note in notes:
            console.print(note)
        console.print()
