"""How every command starts, lets waiting threads sleep, and reports its errors.

`entry` decorates the ``main`` of a command, and `run_command` runs what it does. Nothing here
imports torch: `wait_briefly` must come before torch reads the environment.
"""

from __future__ import annotations

import functools
import io
import os
import select
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dit_engine.current_directory import leave_out, left_out_of_children
from dit_engine.errors import BackendUnavailable
from dit_engine.io.printable import one_line

INTERRUPTED = 130
PIPE_CLOSED = 141
"""The exit codes that a shell gives to programs which SIGINT and SIGPIPE ended."""

SPINS = "10000"
"""How often libgomp's threads look for work before they sleep: longer than the pause between two
operators, shorter than the system's time slice. libgomp's default, 300,000, is milliseconds."""

closed: set[int] = set()
"""Numbers of the standard streams that were closed when the command began, and lead nowhere."""

Main = Callable[..., int]


def entry(main: Main) -> Main:
    """Decorate the ``main`` of a command: it gets usable streams and no current directory on its
    search paths. Help that cannot be printed is an error; Ctrl-C during imports is one line.

    Called without arguments it is a command, and the current directory is left out for good
    (`leave_out`). Called with arguments by another program, it changes the environment only during
    the call (`left_out_of_children`) and leaves that program's ``sys.path`` alone.
    """

    @functools.wraps(main)
    def started(*arguments: object, **options: object) -> int:
        called = any(given is not None for given in (*arguments, *options.values()))
        try:
            _prepare_streams()
            wait_briefly()
            if called:
                with left_out_of_children():
                    return main(*arguments, **options)
            leave_out()
            return main(*arguments, **options)
        except SystemExit as end:  # argparse raises it after --help and after an error
            code = end.code if isinstance(end.code, int) else 0
            raise SystemExit(run_command(lambda: code)) from None
        except KeyboardInterrupt:  # before `run_command`: what a command imports takes seconds
            print("interrupted", file=sys.stderr)
            return INTERRUPTED

    return started


def wait_briefly() -> None:
    """Let OpenMP's threads sleep soon when they wait, unless the environment says how they wait.

    If other programs use the processors too, a thread that waits without sleeping may take the time
    of the thread it waits for; a step then takes many times as long. On an idle machine, waking
    the threads costs a little. libgomp reads its environment once, when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "torch" not in sys.modules:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def run_command(command: Callable[[], int], quiet: bool = False) -> int:
    """Run ``command`` and return its exit code. An error that the user can mend is printed as one
    line, and the code is 2; other exceptions are our bugs and pass through.

    Warnings become one-line notes, or nothing if ``quiet``. If standard output is a pipe whose
    reader has left, as ``head`` does, the command ends without a message.
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
        from dit_engine.runtime import is_out_of_memory  # imports torch, so only when it matters

        if not is_out_of_memory(error):
            raise
        return _fail(error)
    except KeyboardInterrupt as error:
        print(one_line(error) or "interrupted", file=sys.stderr)
        return getattr(error, "exit_code", INTERRUPTED)
    finally:
        _drop_unprinted()


def output_is_a_file() -> None:
    """Call this if standard output gets only messages and the results are in files: a full disk or
    a closed pipe at standard output is then no error."""
    _forgive("stdout")


def _fail(error: Exception) -> int:
    print(f"error: {one_line(error) or type(error).__name__}", file=sys.stderr)
    return 2


@contextmanager
def _notes(quiet: bool) -> Iterator[None]:
    def show(message: object, *_: object, **__: object) -> None:
        from tqdm import tqdm

        tqdm.write(f"note: {one_line(message)}", sys.stderr)  # above a progress bar

    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
        warnings.showwarning = show
        yield


def _close_bars() -> None:
    """Close the bars of loops that an exception ended, so that only its message is left."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()


def _drop_unprinted() -> None:
    """Drop what standard output did not take, which Python would write again at its end."""
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


def _prepare_streams() -> None:
    """Make the standard streams usable, whatever the command was started with.

    A closed stream becomes os.devnull under its own number: otherwise the next file that is opened
    would get the number, and with it what a library prints. Characters that the terminal lacks are
    replaced. What cannot be written to standard error is dropped, so notes and progress bars never
    end a command.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            closed.add(number)
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)  # by programs that the command starts
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    _forgive("stderr")


class _Forgiving(io.FileIO):
    """Silently drops what it cannot write."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(memoryview(data).cast("B"))


def _forgive(name: str) -> None:
    """Replace a standard stream of this process, but not a caller's own, by a `_Forgiving` one."""
    stream = getattr(sys, name)
    if not isinstance(stream, io.TextIOWrapper):
        return
    try:
        number = stream.fileno()
    except OSError:
        return
    raw = getattr(stream.buffer, "raw", stream.buffer)  # unbuffered streams have no ``raw``
    if number > 2 or isinstance(raw, _Forgiving):
        return
    stream.flush()
    # A stream that writes at once (PYTHONUNBUFFERED) becomes line-buffered: this writer would
    # otherwise keep its text until the end.
    setattr(sys, name, io.TextIOWrapper(
        io.BufferedWriter(_Forgiving(number, "w", closefd=False)), encoding=stream.encoding,
        errors="replace", line_buffering=stream.line_buffering or stream.write_through,
    ))  # fmt: skip
