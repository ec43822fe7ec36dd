"""The exception of an export that went wrong."""

from __future__ import annotations


class ExportFailed(ValueError):
    """A graph was made and is not what was asked for; the message, one line, names it."""
