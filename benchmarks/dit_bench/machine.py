"""What a measurement ran on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

BUSY = 0.5
"""Load average above which a report of times says so; importing torch alone adds about 0.1."""
SETTLE_S = 180
"""The longest wait for what ran before, an installation say, to leave the load average."""
PACKAGES = (
    "torch", "numpy", "diffusers", "openvino", "onnxruntime", "tensorrt", "tensorrt-rtx", "triton",
    "tritonclient", "flash-attn", "flash-attn-4", "transformers",
)  # fmt: skip
INSTRUCTIONS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile",
    "amx_bf16", "amx_int8",
)  # fmt: skip
_CPUINFO, _MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
_GPU_STATE = ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "power.limit",
              "temperature.gpu")  # fmt: skip

# Servers and recent desktops, as Linux has them in arch/x86/kernel/cpu/amd.c and
# arch/x86/include/asm/intel-family.h.
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
_ARM = {"0xd0c": "Neoverse N1", "0xd40": "Neoverse V1", "0xd49": "Neoverse N2",
        "0xd4f": "Neoverse V2"}  # fmt: skip


def describe(device: torch.device) -> dict[str, Any]:
    """The "machine" of a report."""
    found: dict[str, Any] = {
        "cpu": processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),  # see `wait_briefly`
        "platform": platform.platform(),
        "python": platform.python_version(),
        "instruction_sets": instruction_sets(),
        "versions": versions(),
        "kernels": kernels(),
    }
    if device.type == "cuda":
        found["cuda"] = describe_cuda(device)
    return found


def overview() -> dict[str, dict[str, Any]]:
    """What ``dit-bench --env`` shows: the machine by topic, and which backends work here."""
    from dit_engine.runtime import parse_device
    from dit_kernels.quantized import quantized_why_not

    device = parse_device(None)
    found = describe(device)
    hardware = {k: v for k, v in found.items() if isinstance(v, str | int)}
    total, available = memory_gib()
    if total is not None:
        free = "" if available is None else f", {available:.1f} available"
        hardware["memory"] = f"{total:.1f} GiB{free}"
    if (load := load_average()) is not None:
        busy = f" (above {BUSY}: busy, times are not to be quoted)" if load > BUSY else ""
        hardware["load average"] = f"{load:.2f}{busy}"
    hardware["instruction sets"] = " ".join(found["instruction_sets"]) or "unknown"
    products = {
        kind: quantized_why_not(kind, torch.device("cpu") if kind == "int8" else device) or "yes"
        for kind in ("int8", "fp8")
    }
    return {"hardware": hardware, "versions": found["versions"], "kernels": found["kernels"],
            "quantised products": products, "backends": backends(device)}  # fmt: skip


def backends(device: torch.device) -> dict[str, str]:
    """The name of every backend → "yes", or in one line why it cannot run here in float32."""
    from dit_bench.contenders import check_backend
    from dit_engine.backends import known_backends
    from dit_engine.io.printable import one_line

    found = {}
    for name in known_backends():
        if name != "auto":
            try:
                check_backend(name, "fp32", device)
                found[name] = "yes"
            except (ImportError, ValueError, RuntimeError, OSError) as error:
                found[name] = one_line(error)
    return found


def versions() -> dict[str, str]:
    """The versions of this project and of the installed packages among `PACKAGES`."""
    from dit_engine._version import __version__

    found = {"dit_engine": __version__, "torch": torch.__version__}
    for package in PACKAGES[1:]:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def kernels() -> dict[str, str]:
    """What `dit_kernels` says of its implementations on this machine."""
    try:
        from dit_kernels import available

        return available()
    except ImportError as error:
        return {"dit_kernels": str(error)}


def memory_gib(path: Path = _MEMINFO) -> tuple[float | None, float | None]:
    """The machine's memory, and how much is available; None where the system does not tell."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    kib = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE))
    total, available = (
        int(kib[key]) / 2**20 if key in kib else None for key in ("MemTotal", "MemAvailable")
    )
    return total, available


def instruction_sets(cpuinfo: str | None = None) -> list[str]:
    """Those of `INSTRUCTIONS` that the processor has; none where the system does not tell."""
    flags = set(_facts(cpuinfo).get("flags", "").split())
    return [name for name in INSTRUCTIONS if name in flags]


def cpu_model(cpuinfo: str | None = None) -> str:
    """The processor's name as the system gives it; cpuinfo: /proc/cpuinfo unless given."""
    return _facts(cpuinfo).get("model name") or platform.processor() or platform.machine()


def processor(cpuinfo: str | None = None) -> str:
    """`cpu_model`, with family, model and generation where the name has no model number:
    "AMD EPYC" → "AMD EPYC (family 25, model 17: Zen 4)"."""
    name, facts = cpu_model(cpuinfo), _facts(cpuinfo)
    if re.search(r"\d{3}", name.split("@")[0]):
        return name
    if {"cpu family", "model"} <= facts.keys():
        family, model = int(facts["cpu family"]), int(facts["model"])
        kind = _generation(facts.get("vendor_id", ""), family, model, int(facts.get("stepping", 0)))
        return f"{name} (family {family}, model {model}{kind and f': {kind}'})"
    if (part := facts.get("CPU part")) is not None:
        kind = _ARM.get(part, "") if facts.get("CPU implementer") == "0x41" else ""
        return f"{name} (part {part}{kind and f': {kind}'})"
    return name


def same_processor(one: Any, other: Any) -> bool:
    """Whether two names may be of one processor, where either may lack its generation."""
    bare = [re.sub(r" \((family|part) [^()]*\)$", "", str(name)) for name in (one, other)]
    return one == other or (bare[0] == bare[1] and bool({one, other} & {*bare}))


def slug(name: str) -> str:
    """A processor's or device's name as part of a file name: "AMD EPYC 9B14" → "amd-epyc-9b14"."""
    plain = re.sub(r"\((r|tm)\)|@.*", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "unknown"


def _facts(cpuinfo: str | None) -> dict[str, str]:
    """What /proc/cpuinfo says of the first processor."""
    if cpuinfo is None:
        there = _CPUINFO.exists()
        cpuinfo = _CPUINFO.read_text(encoding="utf-8", errors="replace") if there else ""
    lines = (line.partition(":") for line in cpuinfo.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _generation(vendor: str, family: int, model: int, stepping: int) -> str:
    """ "" for processors that `_GENERATIONS` does not list."""
    if (vendor, family, model) == ("GenuineIntel", 6, 85):
        return "Skylake" if stepping < 5 else "Cascade Lake" if stepping < 8 else "Cooper Lake"
    for kind, its_vendor, its_family, models in _GENERATIONS:
        if (its_vendor, its_family) == (vendor, family) and model in models:
            return kind
    return ""


def describe_cuda(device: torch.device) -> dict[str, Any]:
    """The CUDA device; None for what neither torch nor nvidia-smi tells."""
    properties = torch.cuda.get_device_properties(device)
    found: dict[str, Any] = {
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "multiprocessors": getattr(properties, "multi_processor_count", None),
        "memory_bytes": getattr(properties, "total_memory", None),
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    return found | dict(zip(_GPU_STATE, _nvidia_smi(properties), strict=True))


def _nvidia_smi(properties: Any) -> list[str | None]:
    """nvidia-smi's answers about `_GPU_STATE`."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_GPU_STATE)}", "--format=csv,noheader,nounits"]
    if (uuid := getattr(properties, "uuid", None)) is not None:
        # Not by number: the devices that torch sees may be others.
        command.append(f"--id=GPU-{str(uuid).removeprefix('GPU-')}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return [None] * len(_GPU_STATE)
    answers = [part.strip() for part in done.stdout.strip().split("\n")[0].split(",")]
    return [*answers] if len(answers) == len(_GPU_STATE) else [None] * len(_GPU_STATE)


def load_average() -> float | None:
    """The load average of the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def settle(log: Callable[[str], object], longest: float = SETTLE_S) -> None:
    """Wait until the load average is an idle machine's, but no longer than ``longest`` seconds."""
    if (load_average() or 0) > BUSY:
        log(f"waiting for a load average of at most {BUSY}, {longest:.0f} s at most")
    waited = 0.0
    while waited < longest and (load_average() or 0) > BUSY:
        time.sleep(min(5.0, longest - waited))
        waited += 5.0
