"""How commands fail: one line on standard error and exit code 2, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from dit_engine.errors import BackendUnavailable


def run_command(command: Callable[[], int]) -> int:
    """Run ``command`` and turn a user's errors into one line; other errors are ours, and show."""
    try:
        return command()
    except (ValueError, OSError, ImportError, MemoryError, BackendUnavailable) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
