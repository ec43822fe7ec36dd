"""Run a program that ends when its starter ends: python supervisor.py PREFIX COMMAND…

Standard input is a pipe that the starter holds open and never writes to. When the starter ends,
even by SIGKILL, the system closes the pipe; the program then gets SIGINT, and later SIGKILL. When
the program has ended for any reason, the regions of shared memory whose names begin with PREFIX are
removed. This file runs beside any server, so it imports only the standard library.
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
    """Run ``command`` in this process's group. Returns its exit code, or 128 + the signal."""
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while program.poll() is None:
        ready, _, _ = select.select([sys.stdin], [], [], _POLL_SECONDS)
        if ready and not os.read(sys.stdin.fileno(), 1):
            program.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                program.wait(ASK_SECONDS)
            program.kill()
            program.wait()  # now nothing makes regions any more, so they can be removed
            remove_regions(prefix)
            os.killpg(0, signal.SIGKILL)  # the program's helpers, and this process
    remove_regions(prefix)
    return program.returncode if program.returncode >= 0 else 128 - program.returncode


def hide_regions(prefix: str) -> None:
    """Let only this user read the regions; Triton makes them readable for everybody."""
    for region in _REGIONS.glob(f"{prefix}*"):
        with suppress(OSError):
            region.chmod(0o600)


def remove_regions(prefix: str) -> None:
    """Remove the regions, which a killed program leaves behind. Processes that have one open can
    still use it."""
    for region in _REGIONS.glob(f"{prefix}*"):
        with suppress(OSError):
            region.unlink()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
