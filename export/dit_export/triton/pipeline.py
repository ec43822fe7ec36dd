"""The model "dit": labels in, images out, the whole sampling loop on the server.

A model of Triton's Python backend ("business logic scripting"): each step is a request to
"dit_guided_step", the end one to "vae_decoder". It needs numpy alone. ``pipeline.json`` beside its
model.py says what the model is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_engine.labels import resolve_labels
from dit_engine.schedule import make_schedule
from dit_export.triton.sampling import Row, sample, to_uint8

STEP_MODEL, DECODER_MODEL = "dit_guided_step", "vae_decoder"
DEFAULT_GUIDANCE_SCALE = 4.0


@dataclass(frozen=True)
class Facts:
    """pipeline.json.

    Attributes:
        shape: (C, S, S) of the latents.
        learn_sigma: whether the model predicts a variance.
        samplers: name → [usual number of steps, spacing].
    """

    shape: tuple[int, int, int]
    learn_sigma: bool
    num_classes: int
    label_names: list[str] | None
    samplers: dict[str, list[Any]]

    @classmethod
    def read(cls, path: Path) -> Facts:
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**(values | {"shape": tuple(values["shape"])}))


def parse_rows(inputs: dict[str, np.ndarray], facts: Facts) -> list[Row]:
    """One row for each image that a request's tensors, each (N, 1), ask for.

    Raises ValueError, one line that names the value and what is allowed.
    """
    columns = {name: column.reshape(-1).tolist() for name, column in inputs.items()}
    if ("labels" in columns) == ("label_names" in columns):
        raise ValueError("give one of labels (numbers) and label_names")
    if "seeds" not in columns:
        raise ValueError("seeds is missing: give one an image")
    asked = columns.get("labels")
    if asked is None:
        asked = [_text(name) for name in columns["label_names"]]
    labels = resolve_labels(asked, facts.num_classes, facts.label_names)
    n = len(labels)
    scales = columns.get("guidance_scale", [DEFAULT_GUIDANCE_SCALE] * n)
    samplers = [_text(name) for name in columns.get("sampler", ["ddpm"] * n)]
    for sampler in samplers:
        if sampler not in facts.samplers:
            allowed = ", ".join(facts.samplers)
            raise ValueError(f"sampler {sampler!r}: choose one of {allowed}")
    steps = columns.get("steps", [facts.samplers[sampler][0] for sampler in samplers])
    for seed, scale in zip(columns["seeds"], scales, strict=True):
        if seed < 0:
            raise ValueError(f"seed {seed} is not a whole number from 0 to {2**63 - 1}")
        if not math.isfinite(scale):
            raise ValueError(f"guidance_scale {scale} is not a finite number")
        if scale < 0:
            raise ValueError(f"guidance_scale {scale} is negative; 0 and above are allowed")
    spacings = [facts.samplers[sampler][1] for sampler in samplers]
    for count, spacing in zip(steps, spacings, strict=True):
        make_schedule(count, spacing)
    columns = zip(labels, columns["seeds"], steps, scales, samplers, spacings, strict=True)
    return [Row(*values) for values in columns]


def _text(value: bytes | str) -> str:
    if isinstance(value, str):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise ValueError(f"text {value!r} is not UTF-8") from None


class TritonPythonModel:
    """What the Python backend loads, starts and calls."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"]) / args["model_version"]
        self.facts = Facts.read(folder / "pipeline.json")

    def execute(self, requests: list[Any]) -> list[Any]:
        """All requests go through the loop together, but none fails for another's fault."""
        import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

        def response(result: np.ndarray | Exception) -> Any:
            if isinstance(result, Exception):
                message = " ".join(str(result).split())
                return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))
            return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("images", result)])

        asked = [self._rows(request) for request in requests]
        good = {i: rows for i, rows in enumerate(asked) if isinstance(rows, list)}

        def unwanted() -> bool:
            return all(requests[i].is_cancelled() for i in good)

        made = dict(zip(good, self._images(list(good.values()), unwanted), strict=True))
        results = (made[i] if isinstance(rows, list) else rows for i, rows in enumerate(asked))
        return [response(result) for result in results]

    def _rows(self, request: Any) -> list[Row] | ValueError:
        try:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            return parse_rows(inputs, self.facts)
        except ValueError as error:
            return error

    def _images(
        self, requests: list[list[Row]], unwanted: Callable[[], bool]
    ) -> list[np.ndarray | Exception]:
        """uint8 images (N, H, W, 3), or what went wrong, for each request."""
        if not requests:
            return []

        def step(inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
            z, x0 = _infer(STEP_MODEL, inputs, ["z_next", "x0"])
            return z, x0

        rows = [row for part in requests for row in part]
        shape, learned = self.facts.shape, self.facts.learn_sigma
        try:
            latents = sample(rows, shape, learned, step, unwanted)  # (ΣN, C, S, S)
        except Refused as error:
            return [error] * len(requests)
        ends = np.cumsum([len(part) for part in requests])[:-1]
        return [_decode(part) for part in np.split(latents, ends)]


class Refused(Exception):
    """Another model of this server answered with an error."""


def _decode(latents: np.ndarray) -> np.ndarray | Exception:
    """Latents (N, C, S, S) → uint8 images (N, H, W, 3), or what went wrong."""
    if not np.isfinite(latents).all():
        return ValueError("the latents are not finite: a smaller guidance_scale is needed")
    try:
        (images,) = _infer(DECODER_MODEL, {"z": latents}, ["images"])
    except Refused as error:
        return error
    return to_uint8(images)


_SCALARS = ("t", "y", "guidance_scale")


def _infer(model: str, inputs: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
    """Ask another model of this server. Raises `Refused`."""
    import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

    tensors = [
        # The configuration has one dimension beside the batch's for each number of a row.
        pb_utils.Tensor(name, value[:, None] if name in _SCALARS else value)
        for name, value in inputs.items()
    ]
    # A model on a GPU would answer with tensors there, which numpy cannot read.
    host = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)
    request = pb_utils.InferenceRequest(
        model_name=model, requested_output_names=outputs, inputs=tensors, preferred_memory=host
    )
    try:
        response = request.exec()
    except pb_utils.TritonModelException as error:  # it is not loaded
        raise Refused(f"{model}: {error}") from None
    if response.has_error():
        raise Refused(f"{model}: {response.error().message()}")
    found = [pb_utils.get_output_tensor_by_name(response, name) for name in outputs]
    return [
        np.array(tensor.as_numpy()) for tensor in found
    ]  # the response's memory is the server's
