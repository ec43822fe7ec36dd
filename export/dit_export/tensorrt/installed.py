"""Which TensorRT and which NVIDIA GPUs are here.

There are two TensorRTs with the same interface: the standard one (module ``tensorrt``) and TensorRT
for RTX.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dit_engine.arguments import choice
from dit_engine.errors import BackendUnavailable
from dit_engine.io.printable import first_line

# name → (module, extra, lowest major version), in the order in which "auto" looks
_FLAVOURS = {
    "tensorrt": ("tensorrt", "tensorrt", 10),
    "rtx": ("tensorrt_rtx", "tensorrt-rtx", 1),
}
FLAVOURS = ("auto", *_FLAVOURS)


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

    Raises ValueError for an unknown name, and ImportError, one line with the extra to install, if
    it cannot be imported or is too old.
    """
    reasons = []
    for flavour in _FLAVOURS if choice("flavour", name, FLAVOURS) == "auto" else (name,):
        module, extra, lowest = _FLAVOURS[flavour]
        try:
            version = import_module(module).__version__
        except Exception as error:  # such as OSError, of a library that it needs
            reason = f"{module} cannot be imported ({first_line(error)})"
        else:
            if int(version.split(".")[0]) >= lowest:
                return Flavour(flavour, module, version)
            reason = f"{module} {version} is too old: {lowest} is needed"
        reasons.append(f"{reason}: pip install 'dit-engine[{extra}]'")
    raise ImportError("; ".join(reasons))


@dataclass(frozen=True)
class CudaDevice:
    """name: such as "NVIDIA H200"; capability: its compute capability, such as "9.0"."""

    name: str
    capability: str

    def __str__(self) -> str:
        return f"{self.name} ({self.capability})"


def require_device(index: int = 0, what: str = "TensorRT") -> CudaDevice:
    """torch's GPU of that number; raises `BackendUnavailable`, one line, if there is none."""
    import torch

    count = torch.cuda.device_count()
    if not 0 <= index < count:
        raise BackendUnavailable(
            f"{what} needs an NVIDIA GPU: torch finds {count}, and number {index} is asked for"
        )
    capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
    return CudaDevice(torch.cuda.get_device_name(index), capability)
