"""A program that ends when whoever started it does: python supervisor.py PREFIX COMMAND…

Its standard input is a pipe that the starter holds open and never writes to. However the starter
ends, also by SIGKILL, the system closes the pipe, and the program is asked to end and then made to.
However the program ends, the regions of shared memory whose names begin with PREFIX are removed. It
runs beside any server, so it needs the standard library alone.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ASK_SECONDS = 20.0
_POLL_SECONDS = 0.1
_REGIONS = Path("/dev/shm")


def main(prefix: str, command: list[str]) -> int:
    """Run ``command`` in this process's group; its exit code, or 128 and more for a signal."""
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while program.poll() is None:
        ready, _, _ = select.select([sys.stdin], [], [], _POLL_SECONDS)
        if ready and not os.read(sys.stdin.fileno(), 1):
            end(program, prefix)
    remove_regions(prefix)
    return program.returncode if program.returncode >= 0 else 128 - program.returncode


def end(program: subprocess.Popen[bytes], prefix: str) -> None:
    """The program, and then all of this process's group: helpers of its own, and this process."""
    program.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        program.wait(ASK_SECONDS)
    program.kill()  # it alone makes regions
    program.wait()
    remove_regions(prefix)
    os.killpg(0, signal.SIGKILL)


def hide_regions(prefix: str) -> None:
    """From other users of this machine, who may read them as a program makes them."""
    for region in _REGIONS.glob(f"{prefix}*"):
        with suppress(OSError):
            region.chmod(0o600)


def remove_regions(prefix: str) -> None:
    """Shared memory under names that begin with ``prefix``, as a program leaves it that is killed.
    Who has it open keeps it."""
    for region in _REGIONS.glob(f"{prefix}*"):
        with suppress(OSError):
            region.unlink()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
