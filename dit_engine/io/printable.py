"""Make text from others safe to print: the terminal shows it and does nothing else."""

from __future__ import annotations

import re
import sys
from typing import TextIO

# Joiners, which Persian, Hindi and emoji need; after an ASCII character they would be invisible.
_JOINER = re.compile("(?<=[^\x00-\x7f\u200c\u200d])[\u200c\u200d]")
# Unicode counts these as letters or marks, but they are invisible.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0")
_LIMIT = 2000  # characters of a message


def printable(text: object) -> str:
    """``text`` with escapes in place of characters that are invisible or act on a terminal.

    These are control characters (also newline and tab), bidirectional controls, line and paragraph
    separators, other invisible characters, lone surrogates and unassigned code points. They become
    "\\x1b", "\\n", "\\u202e" and so on, as in Python's strings. Letters of all scripts stay as they
    are, and so do backslashes and joiners that follow a character which they can join.
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


def say(text: object = "", file: TextIO | None = None, flush: bool = False) -> None:
    """Print ``text`` with each of its lines made `printable`. A part of it that comes from others
    and may hold newlines must have been made printable before."""
    lines = "\n".join(map(printable, str(text).split("\n")))
    print(lines, file=sys.stdout if file is None else file, flush=flush)


def _visible(character: str) -> bool:
    # Spaces beyond ASCII are fine, though Python calls them unprintable.
    return (character.isprintable() or (character.isspace() and character > "\x9f"
            and character not in "\u2028\u2029")) and character not in _BLANK  # fmt: skip
