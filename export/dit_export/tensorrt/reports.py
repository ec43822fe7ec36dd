"""How TensorRT speaks while it builds: its log, its parser's errors and its progress."""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections import deque
from typing import Any

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} {postfix}"
_LOG = logging.getLogger(__name__)


@functools.cache
def process_logger(trt: Any) -> Any:
    """An ILogger that keeps the last errors, for the exception that follows, and logs the rest.

    TensorRT keeps a process's first logger for itself, so there is one, which lives on.
    """

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=16)

        def log(self, severity: Any, msg: str) -> None:
            levels = trt.ILogger.Severity
            if severity in (levels.ERROR, levels.INTERNAL_ERROR):
                self.errors.append(msg)
            elif severity == levels.WARNING:
                _LOG.info(msg)  # such as "int64 input": for those who look
            else:
                _LOG.debug(msg)

    return Logger()


def last_error(logger: Any) -> str:
    """The newest of a logger's errors, in one line."""
    return " ".join(logger.errors[-1].split()) if logger.errors else "it does not say why"


def parser_errors(parser: Any) -> list[str]:
    """One line an error: which node, of which operator, and what is wrong with it."""
    lines = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        where = ""
        if error.node_operator():
            where = f"node {error.node_name() or error.node()} ({error.node_operator()}): "
        lines.append(" ".join(f"{where}{error.desc()}".split()))
    return lines


def make_progress(trt: Any, title: str, quiet: bool) -> Any:
    """An IProgressMonitor that shows the outermost phase as a bar, with the innermost one's name.

    TensorRT calls it from several threads. It has ``close`` and, for a build that was interrupted,
    ``interrupted``.
    """
    from dit_engine.console.bars import Bar

    class Progress(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.bar = Bar(
                desc=title, total=1.0, file=sys.stderr, disable=quiet, leave=False, bar_format=_BAR
            )
            self.interrupted = False
            self._lock = threading.Lock()
            # phase → (parent, steps, steps done)
            self._phases: dict[str, list[Any]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases[phase_name] = [parent_phase, max(num_steps, 1), 0]
                self.bar.set_postfix_str(phase_name, refresh=False)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                with self._lock:
                    self._phases[phase_name][2] = step + 1
                    self._show()
                return True
            except KeyboardInterrupt:  # an exception cannot pass through TensorRT; False stops it
                self.interrupted = True
                return False

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                parent = self._phases.pop(phase_name, [None])[0]
                if parent is None:
                    self.bar.update(max(0.0, 1.0 - self.bar.n))
                else:
                    self._show()

        def _show(self) -> None:
            done = self._fraction(None)
            if done > self.bar.n:  # phases that start anew must not turn the bar back
                self.bar.update(done - self.bar.n)

        def _fraction(self, parent: str | None) -> float:
            """Done of the phases below ``parent``, where the phase under way counts in part."""
            for name, (above, steps, done) in self._phases.items():
                if above == parent:
                    return min(1.0, (done + min(self._fraction(name), 0.99)) / steps)
            return 0.0

        def close(self) -> None:
            self.bar.close()

    return Progress()
