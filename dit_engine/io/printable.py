"""Make text from others safe to show: in a terminal, in Markdown and in a figure."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Joiners, which Persian, Hindi and emoji need; after an ASCII character they would be invisible.
_JOINER = re.compile("(?<=[^\x00-\x7f\u200c\u200d])[\u200c\u200d]")
# Unicode counts these as letters or marks, but they are invisible.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0")
_LIMIT = 2000  # characters of a message

# These become entities, so that they cannot begin a tag, a link, emphasis, a cell or code. Between
# backticks the entities are shown as they are, and cannot end the code.
_ACTIVE = re.compile(r"[&<>|`*\[\]\\]|(?<=:)//|(?<=www)\.")


def printable(text: object) -> str:
    """``text`` with escapes in place of characters that are invisible or act on a terminal.

    Control characters (newline and tab too), bidirectional controls, separators of lines, lone
    surrogates and unassigned code points become "\\x1b", "\\n", "\\u202e" and so on. Letters of all
    scripts and backslashes stay as they are, and so do joiners that follow what they can join.
    """
    text = str(text)
    if text.isprintable() and _BLANK.isdisjoint(text):
        return text
    joiners = {match.start() for match in _JOINER.finditer(text)}
    return "".join(
        each if _visible(each) or i in joiners else each.encode("unicode_escape").decode()
        for i, each in enumerate(text)
    )


def one_line(text: object) -> str:
    """``text``, or an exception's message, as one printable line of bounded length."""
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= _LIMIT else f"{line[: _LIMIT - 1]}…"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, at most 160 characters of it, printable."""
    lines = str(error).strip().splitlines()
    return printable((lines[0] if lines else type(error).__name__)[:160])


def some_of(names: Iterable[str], quote: bool = True) -> str:
    """For messages: the first three names and how many more there are, or "nothing"."""
    every = list(names)
    first = ", ".join(repr(name) if quote else printable(name) for name in every[:3])
    return (first or "nothing") + (f" and {len(every) - 3} more" if len(every) > 3 else "")


def say(text: object = "", file: TextIO | None = None, flush: bool = False) -> None:
    """Print ``text`` with each of its lines made `printable`. A part of it that comes from others
    and may hold newlines must have been made printable before."""
    lines = "\n".join(map(printable, str(text).split("\n")))
    print(lines, file=sys.stdout if file is None else file, flush=flush)


def markdown_text(text: object) -> str:
    """``text`` as one line that is safe in a paragraph, in a table's cell and between backticks."""
    return _ACTIVE.sub(lambda match: f"&#{ord(match[0][0])};{match[0][1:]}", one_line(text))


def markdown_values(value: Any) -> Any:
    """A copy of a JSON value with all strings and keys escaped by `markdown_text`."""
    if isinstance(value, dict):
        return {markdown_text(key): markdown_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [markdown_values(each) for each in value]
    return markdown_text(value) if isinstance(value, str) else value


def show_plainly(figure: Figure) -> Figure:
    """Show every text in ``figure`` literally and `printable`, except the numbers at its axes:
    Matplotlib reads text between two "$" as a formula. Call this when the figure is complete,
    before it is laid out or drawn. Returns ``figure``."""
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatter

    numbers = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        if isinstance(axis.get_major_formatter(), LogFormatter)  # it writes 10² as a formula
        for label in axis.get_ticklabels(which="both")
    }
    for text in figure.findobj(Text):
        if isinstance(text, Text) and text not in numbers:
            text.set_parse_math(False)
            text.set_text("\n".join(map(printable, text.get_text().split("\n"))))
    return figure


def _visible(character: str) -> bool:
    # Spaces beyond ASCII are fine, though Python calls them unprintable.
    return (character.isprintable() or (character.isspace() and character > "\x9f"
            and character not in "\u2028\u2029")) and character not in _BLANK  # fmt: skip
