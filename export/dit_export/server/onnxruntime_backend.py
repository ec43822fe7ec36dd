"""The backend "onnxruntime" in Python, for servers without libtriton_onnxruntime.so.

It serves repositories of the platform "onnxruntime_onnx", on the CPU, as they are. This file is
copied to "onnxruntime/model.py" in a backend directory, where Triton takes it for the code of every
model of that platform. It needs numpy, onnxruntime, and the modules `sources.BACKEND` beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from dit_export.server.origin import refusal


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        import onnxruntime

        config = json.loads(args["model_config"])
        name = config.get("default_model_filename") or "model.onnx"
        path = Path(args["model_repository"]) / args["model_version"] / name
        options = onnxruntime.SessionOptions()
        threads = config.get("parameters", {}).get("intra_op_thread_count")
        if threads is not None:
            options.intra_op_num_threads = int(threads["string_value"])
        # Threads that spin while they wait would take the cores from the other models' processes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(
            str(path.resolve()), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def execute(self, requests: list[Any]) -> list[Any]:
        """One run for all requests of a dynamic batch; if it fails, one run per request, so that
        only the invalid ones among them fail."""
        reasons = [refusal(request) for request in requests]
        allowed = [r for r, reason in zip(requests, reasons, strict=True) if reason is None]
        try:
            answers = self._run(allowed) if len(allowed) > 1 else map(self._run_alone, allowed)
        except Exception:
            answers = map(self._run_alone, allowed)
        left = iter(answers)
        return [next(left) if why is None else _failed(why, mistake=True) for why in reasons]

    def _run_alone(self, request: Any) -> Any:
        try:
            return self._run([request])[0]
        except Exception as error:  # whatever it is, the client must be told
            message = " ".join(str(error).split()) or type(error).__name__
            # onnxruntime raises its own class of this name, for example for an unknown label.
            return _failed(message, mistake=type(error).__name__ == "InvalidArgument")

    def _run(self, requests: list[Any]) -> list[Any]:
        import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

        def tensor(request: Any, name: str) -> np.ndarray:
            return pb_utils.get_input_tensor_by_name(request, name).as_numpy()

        columns = {name: [tensor(each, name) for each in requests] for name in self.inputs}
        batch = {name: np.concatenate(column) for name, column in columns.items()}
        ends = np.cumsum([len(rows) for rows in columns[self.inputs[0]]])[:-1]
        results = self.session.run(self.outputs, batch)
        parts = [np.split(np.asarray(result), ends) for result in results]
        return [
            pb_utils.InferenceResponse(
                [
                    pb_utils.Tensor(name, part[i])
                    for name, part in zip(self.outputs, parts, strict=True)
                    if name in request.requested_output_names()
                ]
            )
            for i, request in enumerate(requests)
        ]


def _failed(message: str, mistake: bool) -> Any:
    """An answer with an error; mistake: whether it is the client's (HTTP's 400) or ours (500)."""
    import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

    codes = pb_utils.TritonError
    code = codes.INVALID_ARG if mistake else codes.INTERNAL
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
