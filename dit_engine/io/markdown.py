"""Escape text from others for generated Markdown."""

from __future__ import annotations

import re
from typing import Any

from dit_engine.io.printable import one_line

# These become entities, so that they cannot begin a tag, a link, emphasis, a cell or code. Between
# backticks the entities are shown as they are, and cannot end the code.
_ACTIVE = re.compile(r"[&<>|`*\[\]\\]|(?<=:)//|(?<=www)\.")


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
