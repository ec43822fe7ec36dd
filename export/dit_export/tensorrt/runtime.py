"""Engines run on numpy arrays, without torch.

>>> engine = TensorRTEngine("engines/transformer-0123456789abcdef.engine")
>>> engine.run(x=x, t=t, y=y)["output"]
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dit_export.tensorrt.cuda_devices import require_device
from dit_export.tensorrt.engine_files import read_description
from dit_export.tensorrt.flavour import choose_flavour
from dit_export.tensorrt.memory import make_memory
from dit_export.tensorrt.session import LoadedEngine, SessionPool


class TensorRTEngine:
    """An engine file, ready to run. Threads may share it; ``streams`` of them run at once.

    Args:
        path: of an engine that `dit-export tensorrt` built.
        memory: "cuda-core", or "pycuda", which is imported only then and captures no CUDA graphs.
        graphs: run each set of shapes as one CUDA graph; None is where ``memory`` can.

    Raises:
        EngineRefused (a ValueError): a file of another version or device, or one that has changed.
        BackendUnavailable: no GPU or no driver. ImportError: a package is missing.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        memory: str = "cuda-core",
        device: int = 0,
        streams: int = 1,
        graphs: bool | None = None,
    ) -> None:
        file = read_description(Path(path))
        gpu = require_device(device)
        flavour = choose_flavour(file.key.flavour)
        first = make_memory(memory, device)
        with first.current():  # the engine is loaded onto the current device
            loaded = LoadedEngine(file, flavour, gpu)
        self.file = file
        self._pool = SessionPool(
            loaded,
            lambda: make_memory(memory, device),
            streams,
            first.captures if graphs is None else graphs,
        )

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays by input name → arrays by output name.

        Raises ValueError for a batch outside the engine's profile, which it names.
        """
        return self._pool.run(inputs)
