"""Call a function with little memory and time, in a fork of this process."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable

import pytest
import torch

linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="forks, and limits memory as Linux does"
)
MIB, SECONDS = 300, 8


def outcome(call: Callable[..., object], *arguments: object, mib: int = MIB) -> str:
    """What ``call`` raises if it may have ``mib`` MiB more than this process, and eight seconds
    of a processor: "ok" or "ValueError: …"."""
    import resource

    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks beside threads, none of which the child needs
        child = os.fork()
    if child == 0:
        text = "ended by no exception"
        try:
            torch.set_num_threads(1)
            with open("/proc/self/statm") as file:  # noqa: PTH123
                now = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + mib * 2**20,) * 2)
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(8 * SECONDS)  # for what waits; others may use the processors too
            call(*arguments)
            text = "ok"
        except BaseException as error:  # a failed test of the parent's must not go on here
            text = f"{type(error).__name__}: {error}"
        finally:
            os.write(writer, text.encode("utf-8", "backslashreplace")[:4000])
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        said = file.read().decode()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"ended by signal {status}"
    return said


def refused(call: Callable[[], object], message: str) -> None:
    said = outcome(call)
    assert "\n" not in said and len(said) < 1000
    kind, _, text = said.partition(": ")
    assert kind == "ValueError" and message in text, said
