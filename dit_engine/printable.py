"""Text of others, such that a terminal shows it and does nothing else."""

from __future__ import annotations

import re
import sys
from typing import TextIO

# Joins letters of Persian or Hindi, and emoji: nothing that ASCII has a use for.
_JOINER = re.compile("(?<=[^\x00-\x7f\u200c\u200d])[\u200c\u200d]")
# Letters and marks for Unicode, but nothing that could be seen.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0")
_LIMIT = 2000  # characters of a message


def printable(text: object) -> str:
    """``text`` with what acts on a terminal, or cannot be seen, as Python's escapes.

    Escaped ("\\x1b", "\\n", "\\u202e") are control characters of all kinds (newline and tab too),
    bidirectional controls, line and paragraph separators, other invisible characters, lone
    surrogates, and what Unicode has not assigned. All scripts stay as they are, backslashes too,
    and the joiners of scripts and emoji where they join something.
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
    """Of an exception's message: at most 160 characters of it, printable."""
    lines = str(error).strip().splitlines()
    return printable((lines[0] if lines else type(error).__name__)[:160])


def say(text: object = "", file: TextIO | None = None, flush: bool = False) -> None:
    """Print the lines of ``text``, each `printable`. A name of others that may hold newlines must
    have been made printable before it came into ``text``."""
    lines = "\n".join(map(printable, str(text).split("\n")))
    print(lines, file=sys.stdout if file is None else file, flush=flush)


def _visible(character: str) -> bool:
    # All spaces are fine: in Python's eyes only one of them is printable.
    return (character.isprintable() or (character.isspace() and character > "\x9f"
            and character not in "\u2028\u2029")) and character not in _BLANK  # fmt: skip
