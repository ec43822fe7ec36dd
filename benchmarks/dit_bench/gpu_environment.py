"""What a run on a GPU ran on: device, driver, versions, and its clocks and power as they are."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from dit_bench.hardware import describe_hardware
from dit_engine._version import __version__

_STATE = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "clocks.max.sm": "sm_max_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
}
PACKAGES = ("triton", "numpy", "flash_attn", "flash-attn-4", "diffusers", "transformer_engine")
"""Named in the record with their version, or None where they are missing."""


def describe_environment(device: torch.device) -> dict[str, Any]:
    """The machine's description; on CUDA also the device's, and its driver."""
    values = describe_hardware() | {"dit_engine": __version__, "device": str(device)}
    values["packages"] = {name: _version(name) for name in PACKAGES}
    values["implementations"] = _implementations()
    if device.type != "cuda":
        return values
    properties = torch.cuda.get_device_properties(device)
    driver = query("driver_version")
    return values | {
        "gpu": getattr(properties, "name", None),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "multiprocessors": getattr(properties, "multi_processor_count", None),
        "memory_gib": _binary(properties, "total_memory", 30),
        "l2_mib": _binary(properties, "L2_cache_size", 20),
        "driver": driver[0] if driver else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def gpu_state(device: torch.device) -> dict[str, float | None]:
    """Clocks, power and temperature now; None for what nvidia-smi does not tell."""
    if device.type != "cuda":
        return {}
    answers = query(*_STATE) or [None] * len(_STATE)
    return {name: _number(text) for name, text in zip(_STATE.values(), answers, strict=True)}


def query(*fields: str) -> list[str] | None:
    """nvidia-smi's answers for torch's current device, or None if it gives none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    uuid = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        uuid = getattr(properties, "uuid", None)
    if uuid is not None:
        uuid = str(uuid).removeprefix("GPU-")
        command.append(f"--id=GPU-{uuid}")  # not by number: the visible devices may be others
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    answers = [part.strip() for part in done.stdout.strip().split("\n")[0].split(",")]
    return answers if len(answers) == len(fields) else None


def _binary(properties: Any, name: str, power: int) -> float | None:
    """A device property in units of 2^power; None where this torch does not tell it."""
    value = getattr(properties, name, None)
    return None if value is None else round(value / 2**power, 1)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:  # "[N/A]"
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _implementations() -> dict[str, str]:
    from dit_kernels import available

    try:
        return available()
    except ImportError as error:
        return {"dit_kernels": str(error)}
