"""What a measurement ran on, to be printed beside it."""

from __future__ import annotations

import os
import platform
import re
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
        "cpu": processor(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),  # see `wait_briefly`
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


def cpu_model(cpuinfo: str | None = None) -> str:
    """The processor's name as the system gives it; cpuinfo: /proc/cpuinfo unless given."""
    named = _facts(cpuinfo).get("model name")
    return named or platform.processor() or platform.machine()


def processor(cpuinfo: str | None = None) -> str:
    """`cpu_model`, with family, model and generation where it has no number of a model in it:
    "AMD EPYC" → "AMD EPYC (family 25, model 17: Zen 4)"."""
    name, facts = cpu_model(cpuinfo), _facts(cpuinfo)
    if re.search(r"\d{3}", name.split("@")[0]):
        return name
    if {"cpu family", "model"} <= facts.keys():
        family, model = int(facts["cpu family"]), int(facts["model"])
        kind = _generation(facts.get("vendor_id", ""), family, model, int(facts.get("stepping", 0)))
        return f"{name} (family {family}, model {model}{kind and f': {kind}'})"
    if "CPU part" in facts:
        part = facts["CPU part"]
        kind = _ARM.get((facts.get("CPU implementer", ""), part), "")
        return f"{name} (part {part}{kind and f': {kind}'})"
    return name


def same_processor(one: str, other: str) -> bool:
    """Whether two names may be of one processor, where either may lack its generation."""
    bare = [re.sub(r" \((family|part) [^()]*\)$", "", name) for name in (one, other)]
    return one == other or (bare[0] == bare[1] and bool({one, other} & {*bare}))


def _facts(cpuinfo: str | None) -> dict[str, str]:
    """Of the first processor."""
    path = Path("/proc/cpuinfo")
    if cpuinfo is None:
        cpuinfo = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = (line.partition(":") for line in cpuinfo.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _generation(vendor: str, family: int, model: int, stepping: int) -> str:
    """ "" for those that `_GENERATIONS` has not."""
    if (vendor, family, model) == ("GenuineIntel", 6, 85):
        return "Skylake" if stepping < 5 else "Cascade Lake" if stepping < 8 else "Cooper Lake"
    for kind, its_vendor, its_family, models in _GENERATIONS:
        if (its_vendor, its_family) == (vendor, family) and model in models:
            return kind
    return ""


# Of servers and recent desktops: generation, vendor, family, models. As Linux has them in
# arch/x86/kernel/cpu/amd.c and arch/x86/include/asm/intel-family.h.
_GENERATIONS = (
    ("Zen", "AuthenticAMD", 23, range(0x30)),
    ("Zen 2", "AuthenticAMD", 23, range(0x30, 0x100)),
    ("Zen 4", "AuthenticAMD", 25, (*range(0x10, 0x20), *range(0x60, 0x80), *range(0xA0, 0xB0))),
    ("Zen 3", "AuthenticAMD", 25, (*range(0x10), *range(0x20, 0x60))),
    ("Zen 5", "AuthenticAMD", 26, range(0x80)),
    ("Haswell", "GenuineIntel", 6, (0x3C, 0x3F, 0x45, 0x46)),
    ("Broadwell", "GenuineIntel", 6, (0x3D, 0x47, 0x4F, 0x56)),
    ("Ice Lake", "GenuineIntel", 6, (0x6A, 0x6C, 0x7D, 0x7E)),
    ("Sapphire Rapids", "GenuineIntel", 6, (0x8F,)),
    ("Emerald Rapids", "GenuineIntel", 6, (0xCF,)),
    ("Granite Rapids", "GenuineIntel", 6, (0xAD, 0xAE)),
)
_ARM = {
    ("0x41", "0xd0c"): "Neoverse N1",
    ("0x41", "0xd40"): "Neoverse V1",
    ("0x41", "0xd49"): "Neoverse N2",
    ("0x41", "0xd4f"): "Neoverse V2",
}
