"""The backend "onnxruntime" in Python, for servers without libtriton_onnxruntime.so.

It serves unchanged repositories of the platform "onnxruntime_onnx", on the CPU. This file is copied
to "onnxruntime/model.py" in a backend directory, where Triton uses it as the code of every model of
that platform. It needs numpy, onnxruntime, and the modules `sources.BACKEND` beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dit_export.server.origin import failed, refusal


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        import onnxruntime

        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        options = onnxruntime.SessionOptions()
        # Threads that spin while they wait would take the cores from the other models' processes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(
            str(path.resolve()), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def execute(self, requests: list[Any]) -> list[Any]:
        reasons = [refusal(request) for request in requests]
        allowed = [r for r, reason in zip(requests, reasons, strict=True) if reason is None]
        answers = iter(self._answers(allowed) if allowed else [])
        return [next(answers) if why is None else failed(why, mistake=True) for why in reasons]

    def _answers(self, requests: list[Any]) -> list[Any]:
        """One run for all requests of a dynamic batch; if it fails, one run per request, so that
        only the invalid ones among them fail."""
        try:
            return self._run(requests)
        except Exception as error:
            if len(requests) > 1:
                return [answer for each in requests for answer in self._answers([each])]
            # onnxruntime raises its own class of this name, for example for an unknown label.
            return [failed(error, mistake=type(error).__name__ == "InvalidArgument")]

    def _run(self, requests: list[Any]) -> list[Any]:
        import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

        def tensor(request: Any, name: str) -> np.ndarray:
            return pb_utils.get_input_tensor_by_name(request, name).as_numpy()

        columns = {name: [tensor(each, name) for each in requests] for name in self.inputs}
        batch = {name: np.concatenate(column) for name, column in columns.items()}
        ends = np.cumsum([len(rows) for rows in columns[self.inputs[0]]])[:-1]
        results = self.session.run(self.outputs, batch)
        parts = {
            name: np.split(np.asarray(result), ends)
            for name, result in zip(self.outputs, results, strict=True)
        }
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(n, parts[n][i]) for n in request.requested_output_names()]
            )
            for i, request in enumerate(requests)
        ]
