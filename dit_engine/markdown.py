"""Text of others in generated Markdown: it stays text, wherever it stands."""

from __future__ import annotations

import re
from typing import Any

from dit_engine.printable import one_line

# As entities, which begin nothing: no tag, link, emphasis, cell or code. Within code they show as
# they are, and end it no more than elsewhere.
_ACTIVE = re.compile(r"[&<>|`*\[\]\\]|(?<=:)//|(?<=www)\.")


def markdown_text(text: object) -> str:
    """``text`` as one line for a paragraph, a table's cell, or between backticks."""
    return _ACTIVE.sub(lambda match: f"&#{ord(match[0][0])};{match[0][1:]}", one_line(text))


def markdown_values(value: Any) -> Any:
    """A JSON value whose texts and keys are all `markdown_text`."""
    if isinstance(value, dict):
        return {markdown_text(key): markdown_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [markdown_values(each) for each in value]
    return markdown_text(value) if isinstance(value, str) else value
