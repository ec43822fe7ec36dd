"""The NVIDIA GPUs of this machine, asked of the driver in a process of its own.

A broken driver may abort a process, and one that has spoken to the driver can no longer fork.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

from dit_engine.errors import BackendUnavailable
from dit_export.tensorrt.flavour import run_probe

# The driver's own library: neither torch nor a CUDA toolkit is needed.
_DEVICES = """
import ctypes, json
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError:
    print(json.dumps("libcuda.so.1 is not found"))
    raise SystemExit
code = cuda.cuInit(0)
if code:
    print(json.dumps(f"cuInit answers {code}"))
    raise SystemExit
count, devices = ctypes.c_int(), []
cuda.cuDeviceGetCount(ctypes.byref(count))
for index in range(count.value):
    device, name, numbers = ctypes.c_int(), ctypes.create_string_buffer(256), []
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    for attribute in (75, 76):  # the compute capability's two numbers
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        numbers.append(str(value.value))
    devices.append([name.value.decode(), ".".join(numbers)])
print(json.dumps(devices))
"""


@dataclass(frozen=True)
class CudaDevice:
    """name: such as "NVIDIA H200"; capability: its compute capability, such as "9.0"."""

    name: str
    capability: str

    def __str__(self) -> str:
        return f"{self.name} ({self.capability})"


@functools.cache
def cuda_devices() -> tuple[tuple[CudaDevice, ...], str]:
    """(the GPUs, "") or ((), why there are none); asked once a process."""
    found, reason = run_probe(_DEVICES)
    if isinstance(found, str) or found is None:
        return (), found or reason
    devices = tuple(CudaDevice(name, capability) for name, capability in found)
    return devices, "" if devices else "it has no GPU"


def require_device(index: int = 0, what: str = "TensorRT") -> CudaDevice:
    """The GPU of that number; raises `BackendUnavailable`, one line, where there is none."""
    devices, reason = cuda_devices()
    if not devices:
        raise BackendUnavailable(f"{what} needs an NVIDIA GPU and its driver: {reason}")
    if not 0 <= index < len(devices):
        raise BackendUnavailable(f"{what}: no GPU {index}; there are {len(devices)}")
    return devices[index]


def make_current(index: int) -> None:
    """Let the CUDA calls of this thread, also those of libraries, go to GPU ``index``.

    For a GPU that `require_device` has found. Raises `BackendUnavailable` where the driver refuses.
    """
    cuda = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    code = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), index)
        or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        or cuda.cuCtxSetCurrent(context)
    )
    if code:
        raise BackendUnavailable(f"GPU {index}: the driver answers {code}")
