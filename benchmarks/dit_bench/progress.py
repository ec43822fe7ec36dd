"""What a long run shows on standard error, and how Ctrl-C or SIGTERM ends it.

The first Ctrl-C only sets a flag: the round that is being timed is finished, and what was measured
is kept. (An exception raised from a signal handler can crash CPython 3.11 once torch.compile has
run.) A second one stops the program at once.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dit_engine.io.printable import printable

DELAY_S = 2.0
"""Bars of what takes less are never drawn."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
LEAST_ROUNDS = 5
"""Of timing, also where the time is up: fewer tell nothing of the noise."""
LONGEST = 2.0
"""No round begins that would end after so many times the time, however few there are."""


class Progress:
    """One bar over the stages of a run."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.interrupted = False
        self._bar: Any = None

    @contextmanager
    def run(self, stages: int) -> Iterator[None]:
        """A bar of ``stages``, and the handler of Ctrl-C and SIGTERM, for this block."""
        from dit_engine.console.bars import Bar

        before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            before = {each: signal.signal(each, self._interrupt) for each in SIGNALS}
        self._bar = Bar(total=stages, desc="dit-bench", unit="part", file=sys.stderr,
                        delay=DELAY_S, leave=False, disable=self.quiet)  # fmt: skip
        try:
            yield
        finally:
            # tqdm's close leaves a bar that was drawn early, for a description or a line above.
            self._bar.clear()
            self._bar.close()
            self._bar = None
            for each, handler in before.items():
                signal.signal(each, handler)

    def stage(self, name: str) -> None:
        """Begin a new stage. Raises KeyboardInterrupt if Ctrl-C was pressed."""
        self.check()
        if self._bar is not None:
            self._bar.set_description(name)

    def done(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def check(self) -> None:
        if self.interrupted:
            raise KeyboardInterrupt

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        from tqdm import tqdm

        if not self.quiet:
            tqdm.write(printable(text), sys.stderr)

    def rounds(self, seconds: float) -> Callable[[], bool]:
        """``go_on`` for `dit_bench.timing.interleave`. It gives False after ``seconds`` and
        `LEAST_ROUNDS` rounds; if another round, as long as those before, would end after `LONGEST`
        times the seconds; or when the run was interrupted."""
        start, done = time.perf_counter(), 0

        def go_on() -> bool:
            nonlocal done
            done += 1
            spent = time.perf_counter() - start
            late = spent >= seconds and done >= LEAST_ROUNDS
            too_long = spent * (done + 1) / done > LONGEST * seconds
            return not (self.interrupted or late or too_long)

        return go_on

    def _interrupt(self, *_: object) -> None:
        self.interrupted = True
        for each in SIGNALS:
            signal.signal(each, signal.default_int_handler)
        print("\nstopping after this round (Ctrl-C again: at once)", file=sys.stderr)
