"""Call a function in a process of its own with limited memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 2**20


def outcome(mib: int, call: Callable[..., Any], *arguments: Any) -> str:
    """Run ``call`` in a fork that may allocate ``mib`` more MiB: "ok", or "ValueError: …"."""
    import resource

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + mib * MIB,) * 2)
            call(*arguments)
            told = "ok"
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        os.write(writer, told.encode()[:4096])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read().decode()
    os.waitpid(child, 0)
    return told or "killed"
