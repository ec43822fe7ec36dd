"""The machine and every version that a measurement depends on."""

from __future__ import annotations

from typing import Any

import torch

from dit_bench.cpu_report import _version, instruction_sets
from dit_bench.gpu_environment import describe_environment
from dit_bench.hardware import describe_hardware

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
