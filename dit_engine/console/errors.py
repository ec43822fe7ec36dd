"""How commands speak on standard error: one line a note, one line and exit code 2 for an error."""

from __future__ import annotations

import os
import select
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dit_engine.errors import BackendUnavailable
from dit_engine.io.printable import one_line

INTERRUPTED = 130
PIPE_CLOSED = 141
"""What a shell says of programs that SIGINT and SIGPIPE ended."""


def run_command(command: Callable[[], int], quiet: bool = False) -> int:
    """Run ``command`` and turn a user's errors into one line; other errors are ours, and show.

    Warnings become one-line notes, or nothing if ``quiet``. Where standard output is a pipe whose
    reader left, as ``head`` does, that is the end, without a word.
    """
    try:
        with _notes(quiet):
            try:
                code = command()
            except BaseException:
                _close_bars()
                raise
            sys.stdout.flush()
            return code
    except BrokenPipeError as error:
        return PIPE_CLOSED if _reader_left() else _fail(error)  # it may be another pipe
    except (ValueError, OSError, ImportError, MemoryError, BackendUnavailable) as error:
        return _fail(error)
    except RuntimeError as error:
        from dit_engine.memory import is_out_of_memory  # imports torch, so only when it matters

        if not is_out_of_memory(error):
            raise
        return _fail(error)
    except KeyboardInterrupt as error:
        print(one_line(error) or "interrupted", file=sys.stderr)
        return getattr(error, "exit_code", INTERRUPTED)
    finally:
        _drop_unprinted()


def _close_bars() -> None:
    """Of loops: the exception still holds them, and their line would stand before its message."""
    if "tqdm" in sys.modules:
        from dit_engine.console.bars import close_all

        close_all()


def _fail(error: Exception) -> int:
    print(f"error: {one_line(error) or type(error).__name__}", file=sys.stderr)
    return 2


def _drop_unprinted() -> None:
    """What standard output did not take, it would refuse once more when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _reader_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # no file at all
        return False
    poll = select.poll()
    poll.register(output, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


@contextmanager
def _notes(quiet: bool) -> Iterator[None]:
    def show(message: object, *_: object, **__: object) -> None:
        note = f"note: {one_line(message)}"
        try:
            from tqdm import tqdm
        except ImportError:  # then there is no progress bar above which to write
            print(note, file=sys.stderr)
        else:
            tqdm.write(note, sys.stderr)

    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
        warnings.showwarning = show
        yield
