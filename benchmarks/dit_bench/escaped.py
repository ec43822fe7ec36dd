"""Reports of others in Markdown: escaped as a whole, before any of it is written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from dit_engine.markdown import markdown_values

Table = Callable[..., str]


def of_escaped(table: Table) -> Table:
    """Decorate a function from reports to Markdown: it is given them with every text escaped."""

    @functools.wraps(table)
    def escaped(*reports: dict[str, Any]) -> str:
        return table(*map(markdown_values, reports))

    return escaped
