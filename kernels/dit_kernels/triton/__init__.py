"""The operators as Triton kernels: NVIDIA GPUs of compute capability 8.0 and later.

One module per operator, imported when it is first called; its launcher has the reference's
arguments and ``out=``, validates nothing that the public operators validate, and never waits for
the device, so that it can be captured in a CUDA graph once it has run for the same shapes.
"""

from __future__ import annotations

import importlib.util
import os

import torch

OLDEST_CAPABILITY = (8, 0)


def why_not(device: torch.device | str | None = None) -> str | None:
    """Why the kernels cannot run on ``device`` (the current GPU when None), or None if they can.

    Under ``TRITON_INTERPRET=1`` they also run, slowly, on tensors of the CPU.
    """
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:  # a bare folder of that name has no origin
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    device = torch.device("cuda" if device is None else device)
    if device.type != "cuda":
        return f"Triton kernels are for CUDA devices, not for {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}: 8.0 is the oldest supported"
    return None
