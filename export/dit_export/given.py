"""What a command line really says: an option that cannot apply is refused, and not ignored."""

from __future__ import annotations

import argparse
from collections.abc import Iterable


def options_given(parser: argparse.ArgumentParser, words: list[str]) -> dict[str, str]:
    """Attribute of the namespace → its option ("queue_delay" → "--queue-delay"), of those that are
    among ``words``, also where they say what the default is.

    parser: of its own for this, since it has no defaults afterwards.
    """
    options = {}
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        options[action.dest] = max(action.option_strings, key=len, default=action.dest)
    return {name: options[name] for name in vars(parser.parse_args(words))}


def refuse(arguments: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    """Raise ValueError for the first of ``names`` that was given; reason: why it cannot apply."""
    for name in names:
        if name in arguments.given:
            raise ValueError(f"{arguments.given[name]} {reason}")
