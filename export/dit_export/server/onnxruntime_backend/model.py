"""The backend "onnxruntime" in Python, for servers without libtriton_onnxruntime.so.

It serves repositories that name the platform "onnxruntime_onnx", on the CPU, as they are. Triton
calls it a Python-based backend: this file, in a folder "onnxruntime" of the backend directory, is
the code of every model of that platform. It needs numpy and onnxruntime, and the package with
`dit_export.server.origin` beside it.
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
        """One run for all requests of a dynamic batch; should it fail, one for each."""
        import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

        def tensor(request: Any, name: str) -> np.ndarray:
            return pb_utils.get_input_tensor_by_name(request, name).as_numpy()

        def run(group: list[Any]) -> list[Any]:
            columns = {name: [tensor(request, name) for request in group] for name in self.inputs}
            counts = [len(column) for column in columns[self.inputs[0]]]
            results = self.session.run(
                self.outputs, {name: np.concatenate(column) for name, column in columns.items()}
            )
            ends = np.cumsum(counts)[:-1]
            parts = [np.split(np.asarray(result), ends) for result in results]
            return [
                pb_utils.InferenceResponse(
                    [
                        pb_utils.Tensor(name, part[i])
                        for name, part in zip(self.outputs, parts, strict=True)
                        if name in request.requested_output_names()
                    ]
                )
                for i, request in enumerate(group)
            ]

        def run_alone(request: Any) -> Any:
            try:
                return run([request])[0]
            except Exception as error:  # whatever it is, the client must hear of it
                message = " ".join(str(error).split()) or type(error).__name__
                # onnxruntime's own class of that name; such as a label of no class.
                return failed(message, mistake=type(error).__name__ == "InvalidArgument")

        def run_all(group: list[Any]) -> list[Any]:
            if len(group) > 1:
                try:
                    return run(group)
                except Exception:  # one request is bad; run one by one, only that one fails
                    pass
            return [run_alone(request) for request in group]

        def failed(message: str, mistake: bool) -> Any:
            codes = pb_utils.TritonError
            code = codes.INVALID_ARG if mistake else codes.INTERNAL
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))

        reasons = [refusal(request) for request in requests]
        answered = [r for r, reason in zip(requests, reasons, strict=True) if reason is None]
        answers = iter(run_all(answered))
        return [
            next(answers) if reason is None else failed(reason, mistake=True) for reason in reasons
        ]
