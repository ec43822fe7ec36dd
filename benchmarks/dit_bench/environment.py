"""The machine and every version that a measurement depends on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from dit_bench.cpu_report import _version, instruction_sets
from dit_bench.gpu_environment import describe_environment
from dit_bench.hardware import BUSY, describe_hardware, load_average

PACKAGES = (
    "torch", "numpy", "diffusers", "openvino", "onnxruntime", "tensorrt", "tensorrt-rtx", "triton",
    "tritonclient", "flash-attn", "transformers",
)  # fmt: skip


def environment() -> dict[str, dict[str, object]]:
    """The hardware, and what of `dit_kernels` and of the backends it can run."""
    from dit_kernels import available
    from dit_kernels.quantized import quantized_why_not

    gpu = describe_hardware().get("gpu")
    products = {
        kind: quantized_why_not(
            kind, torch.device("cuda" if gpu and kind == "fp8" else "cpu")
        ) or "yes"
        for kind in ("int8", "fp8")
    }  # fmt: skip
    return {
        "hardware": describe_hardware(),
        "versions": dict(versions()),
        "kernels": dict(available()),
        "quantised products": dict(products),
    }


def overview() -> dict[str, dict[str, object]]:
    """`environment` with the memory, the load average, and which backends work here."""
    found = environment()
    hardware = {k: v for k, v in found["hardware"].items() if k != "torch"}  # it is a version
    total, available = memory_gib()
    if total is not None:
        free = "" if available is None else f", {available:.1f} available"
        hardware["memory"] = f"{total:.1f} GiB{free}"
    if (load := load_average()) is not None:
        busy = f" (above {BUSY}: busy, times are not to be quoted)" if load > BUSY else ""
        hardware["load average"] = f"{load:.2f}{busy}"
    return found | {"hardware": hardware, "backends": dict(backends())}


def backends() -> dict[str, str]:
    """Every backend's name → "yes", or why it cannot run here, in one line; of float32."""
    from dit_bench.contenders import check_backend
    from dit_engine.backends import known_backends
    from dit_engine.errors import BackendUnavailable
    from dit_engine.io.printable import one_line
    from dit_engine.runtime import parse_device

    device, found = parse_device(None), {}
    for name in known_backends():
        if name == "auto":
            continue
        try:
            check_backend(name, "fp32", device)
            found[name] = "yes"
        except (BackendUnavailable, ImportError, ValueError, OSError) as error:
            found[name] = one_line(error)
    return found


def memory_gib(path: Path = Path("/proc/meminfo")) -> tuple[float | None, float | None]:
    """The machine's memory, and what of it is available; None where the system does not tell."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    kib = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE))
    total, available = (kib.get(key) for key in ("MemTotal", "MemAvailable"))
    return (None if total is None else int(total) / 2**20,
            None if available is None else int(available) / 2**20)  # fmt: skip


def describe(device: torch.device) -> dict[str, Any]:
    """The environment of a report."""
    found: dict[str, Any] = {**environment(), "instruction_sets": instruction_sets()}
    if device.type == "cuda":
        found["gpu"] = describe_environment(device)
    return found


def versions() -> dict[str, str]:
    """Of this project and of the installed ones among `PACKAGES`."""
    from dit_engine._version import __version__

    found = {package: _version(package) for package in PACKAGES}
    return {"dit_engine": __version__} | {k: v for k, v in found.items() if v is not None}
