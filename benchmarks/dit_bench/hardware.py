"""What a measurement ran on, to be printed beside it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BUSY = 0.5
"""Load average above which a report of times says so; importing torch alone adds about 0.1."""
SETTLE_S = 180
"""The longest wait for what ran before, an installation say, to leave the load average."""


def describe_hardware() -> dict[str, Any]:
    """Processor, operating system, versions and threads; and the GPU where there is one."""
    values: dict[str, Any] = {
        "cpu": cpu_model(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        values["gpu"] = torch.cuda.get_device_name()
    return values


def load_average() -> float | None:
    """Of the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def settle(log: Callable[[str], object], longest: float = SETTLE_S) -> None:
    """Wait until the load average is an idle machine's, but no longer than ``longest`` seconds."""
    if (load_average() or 0) > BUSY:
        log(f"waiting for a load average of at most {BUSY}, {longest:.0f} s at most")
    waited = 0.0
    while waited < longest and (load_average() or 0) > BUSY:
        time.sleep(min(5.0, longest - waited))
        waited += 5.0


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
