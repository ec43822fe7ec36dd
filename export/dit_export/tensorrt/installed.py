"""Which TensorRT and which NVIDIA GPUs are here, and TensorRT's log.

There are two TensorRTs with the same interface: the standard one (module ``tensorrt``) and TensorRT
for RTX.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dit_engine.arguments import choice
from dit_engine.errors import BackendUnavailable
from dit_engine.io.printable import first_line, one_line

# name → (module, extra, lowest major version), in the order in which "auto" looks
_FLAVOURS = {
    "tensorrt": ("tensorrt", "tensorrt", 10),
    "rtx": ("tensorrt_rtx", "tensorrt-rtx", 1),
}
FLAVOURS = ("auto", *_FLAVOURS)
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Flavour:
    """A TensorRT that can be imported: "tensorrt" or "rtx", and a version such as "10.13.2.6"."""

    name: str
    module_name: str
    version: str

    @property
    def builds_without_gpu(self) -> bool:
        """Whether no GPU is needed for a build: TensorRT for RTX chooses kernels when an engine is
        loaded, while the standard one times them during the build."""
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
    """The GPU that has ``index`` in torch; raises a one-line `BackendUnavailable` if none has."""
    import torch

    count = torch.cuda.device_count()
    if not 0 <= index < count:
        raise BackendUnavailable(
            f"{what} needs an NVIDIA GPU: torch finds {count}, and number {index} is asked for "
            "(the first is 0)"
        )
    capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
    return CudaDevice(torch.cuda.get_device_name(index), capability)


@functools.cache
def process_logger(trt: Any) -> Any:
    """An ILogger that keeps the last errors for the exception that follows, and logs the rest.

    There is one per process, because TensorRT keeps a process's first logger for itself.
    """

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=16)

        def log(self, severity: Any, msg: str) -> None:
            levels = trt.ILogger.Severity
            if severity in (levels.ERROR, levels.INTERNAL_ERROR):
                self.errors.append(msg)
            else:
                _LOG.log(logging.INFO if severity == levels.WARNING else logging.DEBUG, msg)

    return Logger()


def last_error(logger: Any) -> str:
    return one_line(logger.errors[-1]) if logger.errors else "it does not say why"
