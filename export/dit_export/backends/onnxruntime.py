"""The onnxruntime backend. Its sessions read and write torch tensors where they are."""

from __future__ import annotations

import threading
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dit_engine.backends import Backend, Denoiser
from dit_engine.errors import BackendUnavailable
from dit_engine.model import DiT
from dit_export.backends.pair import GRAPHS, GraphPair
from dit_export.bundle import Bundle
from dit_export.cache import cached_export
from dit_export.onnx.export import ExportOptions
from dit_export.onnx.files import check_metadata, require_onnx
from dit_export.source import weights_hash

_NUMPY = {torch.float32: np.float32, torch.int64: np.int64}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeBackend(Backend):
    """The first use exports the model to a cache directory (`dit_export.cache`).

    Args:
        address: an export of this model to run instead, as in "onnxruntime:///path/to/export".

    Raises:
        BackendUnavailable: a device or precision that onnxruntime cannot run.
        ValueError: ``address`` is not an export, is damaged, or is one of another model.
        ImportError: a package of the extra "onnx" is missing.
    """

    def __init__(
        self, model: DiT, precision: str, device: torch.device, address: str | None = None
    ) -> None:
        require_onnx()
        check_device(device)
        if precision == "bf16" and device.type == "cpu":
            raise BackendUnavailable(
                "precision 'bf16': onnxruntime has no bfloat16 operators for the CPU; "
                "use fp32, fp16 or int8"
            )
        self.device, self.config = device, model.config
        if address is None:
            self.bundle = cached_export(model, ExportOptions(precision, graphs=GRAPHS))
        else:
            self.bundle = _opened(address, model, precision)
        self._pair: tuple[int, GraphPair] | None = None
        self._lock = threading.Lock()

    def prepare(self, labels: Tensor, timesteps: Tensor) -> Denoiser:
        threads = torch.get_num_threads()  # which the engine sets while it generates
        with self._lock:
            if self._pair is None or self._pair[0] != threads:
                self._pair = threads, self._make_pair(threads)
            pair = self._pair[1]
        return pair.prepare(labels, timesteps)

    def _make_pair(self, threads: int) -> GraphPair:
        files = (self.bundle.file(graph) for graph in GRAPHS)
        conditioner, denoiser = (Session(file, self.device, threads) for file in files)

        def condition(t: Tensor, y: Tensor) -> Tensor:
            output = torch.empty(len(t), pair.width, dtype=torch.float32, device=self.device)
            conditioner.run({"t": t, "y": y}, {"modulations": output})
            return output

        def denoise(x: Tensor, modulations: Tensor) -> Tensor:
            shape = (len(x), self.config.out_channels, *x.shape[2:])
            output = torch.empty(shape, dtype=torch.float32, device=self.device)
            denoiser.run({"x": x, "modulations": modulations}, {"output": output})
            return output

        pair = GraphPair(self.config, self.device, condition, denoise)
        return pair


def _opened(address: str, model: DiT, precision: str) -> Bundle:
    bundle = Bundle.open(Path(address))
    if bundle.config != model.config or bundle.checkpoint != weights_hash(model):
        raise ValueError(f"{address}: an export of another model")
    if bundle.dtype != precision:
        raise ValueError(
            f"{address}: an export in {bundle.dtype}; precision {precision!r} is asked"
        )
    for graph in GRAPHS:
        check_metadata(bundle, graph)
    return bundle


def check_device(device: torch.device) -> None:
    """Raise BackendUnavailable, which says why, if onnxruntime cannot use ``device``."""
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


class Session:
    """One graph, ready to run on ``device`` with ``threads`` CPU threads. Threads may share it."""

    def __init__(self, path: Path, device: torch.device, threads: int) -> None:
        ort = import_module("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Threads spin during a run, but sleep between runs, when torch's threads need the cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        provider = _PROVIDERS[device.type]
        settings = {} if device.type == "cpu" else {"device_id": str(device.index or 0)}
        self.session = ort.InferenceSession(str(path), options, [(provider, settings)])
        if self.session.get_providers()[0] != provider:  # onnxruntime would go on without it
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
                place = (self.device.type, self.device.index or 0)
                bind(name, *place, _NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        if self.device.type == "cuda":  # onnxruntime has a stream of its own
            torch.cuda.current_stream(self.device).synchronize()
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:
            if "allocate memory" in str(error):  # its exceptions share no base class but Exception
                raise MemoryError(f"onnxruntime: {error}") from None
            raise
        binding.synchronize_outputs()
