"""onnxruntime sessions whose inputs and outputs are torch tensors, bound where they lie."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_engine.errors import BackendUnavailable

_NUMPY = {torch.float32: np.float32, torch.int64: np.int64}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def check_device(device: torch.device) -> None:
    """Raises BackendUnavailable, saying what is missing, if onnxruntime cannot use ``device``."""
    ort = import_module("onnxruntime")
    provider = _PROVIDERS.get(device.type)
    if provider is None:
        raise BackendUnavailable(
            f"backend 'onnxruntime' runs on {' and '.join(_PROVIDERS)}, not on {device.type!r}"
        )
    if provider not in ort.get_available_providers():
        raise BackendUnavailable(
            f"onnxruntime {ort.__version__} is a build without {provider}: "
            "pip uninstall onnxruntime, then pip install 'dit-engine[onnx-gpu]'"
        )


def session_options(threads: int) -> Any:
    """onnxruntime's SessionOptions for ``threads`` CPU threads.

    Threads spin while a run lasts and sleep between two, when torch's own threads need the cores.
    ``python -m dit_bench.session_options`` measures these beside all others that could matter.
    """
    options = import_module("onnxruntime").SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


class Session:
    """One graph, ready to run on ``device`` with ``threads`` CPU threads. Threads may share it."""

    def __init__(self, path: Path, device: torch.device, threads: int, options: Any = None) -> None:
        ort = import_module("onnxruntime")
        if options is None:
            options = session_options(threads)
        provider = _PROVIDERS[device.type]
        asked: list[Any] = [provider]
        if device.type == "cuda":
            asked = [(provider, {"device_id": str(device.index or 0)})]
        self.session = ort.InferenceSession(str(path), options, providers=asked)
        if self.session.get_providers()[0] != provider:  # onnxruntime would go on without
            raise BackendUnavailable(
                f"onnxruntime could not load {provider}; CUDA's or cuDNN's libraries are missing"
            )
        self.device = device

    def run(self, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        """Fill ``outputs`` from ``inputs``: contiguous float32 or int64 tensors on the device."""
        binding = self.session.io_binding()
        for tensors, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
            for name, tensor in tensors.items():
                assert tensor.is_contiguous() and tensor.device.type == self.device.type
                bind(
                    name, self.device.type, self.device.index or 0, _NUMPY[tensor.dtype],
                    tuple(tensor.shape), tensor.data_ptr(),
                )  # fmt: skip
        if self.device.type == "cuda":  # onnxruntime has a stream of its own
            torch.cuda.current_stream(self.device).synchronize()
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:
            if "allocate memory" in str(error):  # its exceptions share no base class but Exception
                raise MemoryError(f"onnxruntime: {error}") from None
            raise
        binding.synchronize_outputs()
