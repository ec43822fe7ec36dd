"""Tables as data, and how they are shown: on a terminal by rich, and in a page as HTML."""

from __future__ import annotations

import errno
import html
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

DASH = "–"
"""A cell without a value."""
_UNFOLDED = 100_000  # columns; tables are no wider than they need be


@dataclass
class Table:
    """The first ``left`` columns and the last ``right`` ones are words, the others numbers.

    Cells are text.
    """

    title: str
    columns: list[str]
    left: int = 1
    right: int = 0
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        """A row; missing cells at its end are empty."""
        texts = ["" if cell is None else str(cell) for cell in cells]
        self.rows.append(texts + [""] * (len(self.columns) - len(texts)))

    def words(self, column: int) -> bool:
        """Whether the column is aligned to the left."""
        return column < self.left or column >= len(self.columns) - self.right

    def filled(self) -> Table:
        """Without the columns that are empty, or a dash, in every row."""
        kept = [i for i in range(len(self.columns))
                if not self.rows or any(row[i] not in ("", DASH) for row in self.rows)]  # fmt: skip
        words = [i for i in kept if self.words(i)]
        left = sum(i < self.left for i in kept)
        return Table(
            self.title, [self.columns[i] for i in kept], left, len(words) - left,
            [[row[i] for i in kept] for row in self.rows], self.notes,
        )  # fmt: skip

    def html(self) -> str:
        return self.filled()._html()

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


def require_rich() -> None:
    """Raise a one-line ImportError where the tables could not be shown."""
    try:
        import rich  # noqa: F401
    except ImportError:
        raise ImportError("rich is not installed: pip install 'dit-engine[bench]'") from None


def show(tables: Sequence[Table], width: int | None = None) -> None:
    """Print the tables; ``width`` in columns is the terminal's unless given.

    Where the output is no terminal, a row is one line, as long as it need be.
    """
    require_rich()
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable

    if width is None and not sys.stdout.isatty():
        width = _UNFOLDED

    class Pipeable(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError(errno.EPIPE, "standard output is closed")  # rich would exit

    console = Pipeable(width=width, highlight=False, markup=False, emoji=False)
    for table in map(Table.filled, tables):
        shown = RichTable(title=table.title, title_justify="left", box=SIMPLE_HEAD,
                          title_style="bold", pad_edge=False,
                          show_header=any(table.columns))  # fmt: skip
        for i, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if table.words(i) else "right",
                             overflow="fold")  # fmt: skip
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
        for note in table.notes:
            console.print(f"  {note}")
        console.print()
