"""What every command does first: make standard streams work, let waiting threads sleep, and leave
the current directory out of all search paths."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable
from typing import Any

from dit_engine.console.errors import INTERRUPTED, run_command
from dit_engine.console.waiting import wait_briefly
from dit_engine.current_directory import leave_out, left_out_of_children

Main = Callable[..., int]

closed: set[int] = set()
"""Numbers of the standard streams that were closed when the command began, and lead nowhere."""


def entry(main: Main) -> Main:
    """Decorate the ``main`` of a command: `prepare` runs first, and help that could not be printed
    is an error like any other, and so is Ctrl-C before the command is at work.

    Without arguments it is a command, and the current directory is left out for good (`leave_out`).
    With arguments a program calls it: that program's own path stays as it is, and its environment
    is changed during the call only (`left_out_of_children`).
    """

    @functools.wraps(main)
    def started(*arguments: object, **options: object) -> int:
        called = any(given is not None for given in (*arguments, *options.values()))
        try:
            prepare()
            if called:
                with left_out_of_children():
                    return main(*arguments, **options)
            leave_out()
            return main(*arguments, **options)
        except SystemExit as end:  # argparse's, after --help or an error
            code = end.code if isinstance(end.code, int) else 0
            raise SystemExit(run_command(lambda: code)) from None
        except KeyboardInterrupt:  # before `run_command`: what a command imports takes seconds
            print("interrupted", file=sys.stderr)
            return INTERRUPTED

    return started


def prepare() -> None:
    """Make the standard streams usable, whatever the command was started with, and `wait_briefly`.

    A closed stream becomes os.devnull, under its own number: otherwise the next file that is opened
    would get the number, and with it what a library prints. Characters that the terminal has not
    are replaced. What cannot be written to standard error is dropped: notes and progress end no
    command.
    """
    _open_closed()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    _forgive("stderr")
    wait_briefly()


def output_is_a_file() -> None:
    """Call this if standard output gets only messages: then a full disk or a closed pipe there is
    no error of a command whose files are written."""
    _forgive("stdout")


def _open_closed() -> None:
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


class _Forgiving(io.FileIO):
    """Silently drops what it cannot write."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(memoryview(data).cast("B"))


def _forgive(name: str) -> None:
    stream = getattr(sys, name)
    if not isinstance(stream, io.TextIOWrapper):
        return
    if isinstance(getattr(stream.buffer, "raw", stream.buffer), _Forgiving):  # raw: if buffered
        return
    try:
        number = stream.fileno()
    except OSError:
        return
    if number > 2:  # a caller's own stream
        return
    stream.flush()
    raw = _Forgiving(number, "w", closefd=False)
    # What passes through at once (PYTHONUNBUFFERED) would wait in this writer for its end.
    setattr(sys, name, io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=stream.encoding, errors="replace",
        line_buffering=stream.line_buffering or stream.write_through,
    ))  # fmt: skip
