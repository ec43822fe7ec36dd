"""How commands speak on standard error: one line a note, one line and exit code 2 for an error."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dit_engine.errors import BackendUnavailable


def run_command(command: Callable[[], int], quiet: bool = False) -> int:
    """Run ``command`` and turn a user's errors into one line; other errors are ours, and show.

    Warnings become one-line notes, or nothing if ``quiet``.
    """
    try:
        with _notes(quiet):
            return command()
    except (ValueError, OSError, ImportError, MemoryError, BackendUnavailable) as error:
        return _fail(error)
    except RuntimeError as error:
        from dit_engine.memory import is_out_of_memory  # imports torch, so only when it matters

        if not is_out_of_memory(error):
            raise
        return _fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def one_line(text: object) -> str:
    return " ".join(str(text).split())


def _fail(error: Exception) -> int:
    print(f"error: {one_line(error) or type(error).__name__}", file=sys.stderr)
    return 2


@contextmanager
def _notes(quiet: bool) -> Iterator[None]:
    def show(message: object, *_: object, **__: object) -> None:
        from tqdm import tqdm

        tqdm.write(
            f"note: {one_line(message)}", sys.stderr
        )  # above a progress bar, if there is one

    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
        warnings.showwarning = show
        yield
