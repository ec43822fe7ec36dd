"""Which TensorRT and which NVIDIA GPUs are here.

There are two TensorRTs with the same interface: the standard one (module ``tensorrt``) and TensorRT
for RTX. Importing one may abort or hang if its libraries and the driver do not agree, a broken
driver may abort the process, and a process that has spoken to the driver can no longer fork. So
both questions are asked in processes of their own.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import subprocess
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dit_engine.arguments import choice
from dit_engine.current_directory import python
from dit_engine.errors import BackendUnavailable

PROBE_SECONDS = 60.0
"""A probe that takes longer counts as one that hangs."""

# name → (module, extra, lowest major version), in the order in which "auto" looks
_FLAVOURS = {
    "tensorrt": ("tensorrt", "tensorrt", 10),
    "rtx": ("tensorrt_rtx", "tensorrt-rtx", 1),
}
FLAVOURS = ("auto", *_FLAVOURS)

_IMPORT = """
import json, sys
print(json.dumps(__import__(sys.argv[1]).__version__))
"""

# The driver's own library answers, so neither torch nor a CUDA toolkit is needed. 75 and 76 are the
# attributes that hold the two numbers of the compute capability.
_DEVICES = """
import ctypes, json
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError:
    print(json.dumps("libcuda.so.1 is not found"))
    raise SystemExit
if code := cuda.cuInit(0):
    print(json.dumps(f"cuInit answers {code}"))
    raise SystemExit
count, devices = ctypes.c_int(), []
cuda.cuDeviceGetCount(ctypes.byref(count))
for index in range(count.value):
    device, name, numbers = ctypes.c_int(), ctypes.create_string_buffer(256), []
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    for attribute in (75, 76):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        numbers.append(str(value.value))
    devices.append([name.value.decode(), ".".join(numbers)])
print(json.dumps(devices))
"""


@dataclass(frozen=True)
class Flavour:
    """A TensorRT that can be imported.

    Attributes:
        name: "tensorrt" or "rtx".
        module_name: what is imported.
        version: such as "10.13.2.6"; an engine runs only with exactly this version.
    """

    name: str
    module_name: str
    version: str

    @property
    def builds_without_gpu(self) -> bool:
        """TensorRT for RTX compiles for GPUs that are not there. It chooses its kernels when an
        engine is loaded, while the standard one times them during the build."""
        return self.name == "rtx"

    def load(self) -> Any:
        return import_module(self.module_name)

    def __str__(self) -> str:
        title = "TensorRT for RTX" if self.name == "rtx" else "TensorRT"
        return f"{title} {self.version}"


def choose_flavour(name: str = "auto") -> Flavour:
    """The TensorRT that ``name`` stands for; "auto" is the standard one if both are installed.

    Raises:
        ValueError: an unknown name.
        ImportError: one line: it is not installed (with the extra that installs it), is too old,
            or its import fails, aborts or hangs.
    """
    reasons = []
    for flavour in _FLAVOURS if choice("flavour", name, FLAVOURS) == "auto" else (name,):
        module, extra, lowest = _FLAVOURS[flavour]
        if importlib.util.find_spec(module) is None:
            reasons.append(f"{module} is not installed: pip install 'dit-engine[{extra}]'")
            continue
        version, reason = probe_import(module)
        if version is None:
            reasons.append(f"{module} cannot be imported: {reason}")
        elif int(version.split(".")[0]) < lowest:
            reasons.append(f"{module} {version} is too old: {lowest} is needed")
        else:
            return Flavour(flavour, module, version)
    raise ImportError("; ".join(reasons))


@functools.cache
def probe_import(module: str) -> tuple[str | None, str]:
    """(version, "") of a module that can be imported, else (None, the reason). Each module is tried
    once per process."""
    return run_probe(_IMPORT, module)


def run_probe(code: str, *arguments: str, timeout_seconds: float | None = None) -> tuple[Any, str]:
    """Run Python code that prints one line of JSON in another process: (the value, "").

    If the process fails, aborts or takes too long: (None, the reason).
    """
    limit = PROBE_SECONDS if timeout_seconds is None else timeout_seconds
    try:
        done = subprocess.run(
            python(code, *arguments), capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {limit:g} s"
    if done.returncode < 0:
        return None, f"it ended with signal {-done.returncode}"
    if done.returncode > 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return None, lines[-1].strip() if lines else f"exit code {done.returncode}"
    try:
        return json.loads(done.stdout.splitlines()[-1]), ""
    except (IndexError, ValueError):
        return None, "it ended without an answer"


@dataclass(frozen=True)
class CudaDevice:
    """name: such as "NVIDIA H200"; capability: its compute capability, such as "9.0"."""

    name: str
    capability: str

    def __str__(self) -> str:
        return f"{self.name} ({self.capability})"


@functools.cache
def cuda_devices() -> tuple[tuple[CudaDevice, ...], str]:
    """(the GPUs, "") or ((), why there are none); the driver is asked once per process."""
    found, reason = run_probe(_DEVICES)
    if isinstance(found, str) or found is None:
        return (), found or reason
    devices = tuple(CudaDevice(name, capability) for name, capability in found)
    return devices, "" if devices else "it has no GPU"


def require_device(index: int = 0, what: str = "TensorRT") -> CudaDevice:
    """The GPU of that number; raises `BackendUnavailable`, one line, if there is none."""
    devices, reason = cuda_devices()
    if not devices:
        raise BackendUnavailable(f"{what} needs an NVIDIA GPU and its driver: {reason}")
    if not 0 <= index < len(devices):
        raise BackendUnavailable(f"{what}: no GPU {index}; there are {len(devices)}")
    return devices[index]


def make_current(index: int) -> None:
    """Let the CUDA calls of this thread, also those of libraries, go to GPU ``index``, which
    `require_device` has found. Raises `BackendUnavailable` if the driver refuses."""
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
