"""Escape reports from others before they are written as Markdown."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from dit_engine.io.printable import markdown_values

Table = Callable[..., str]


def of_escaped(table: Table) -> Table:
    """Decorator for a function that turns reports into Markdown: escape all text in the reports."""

    @functools.wraps(table)
    def escaped(*reports: dict[str, Any]) -> str:
        return table(*map(markdown_values, reports))

    return escaped
