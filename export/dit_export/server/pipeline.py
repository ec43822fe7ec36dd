"""The model "dit": labels in, images out, the whole sampling loop on the server.

It is a model of Triton's Python backend. Each step is a request to the model "dit_guided_step", and
the last latents go to "vae_decoder". It needs only numpy. The file ``pipeline.json`` beside its
model.py says what was exported.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from dit_engine.arguments import choice, shown
from dit_engine.labels import resolve_labels
from dit_engine.sampling.diffusion import Diffusion
from dit_export.server.origin import failed, refusal
from dit_export.server.sampling import Facts, Row, sample, to_uint8

STEP_MODEL, DECODER_MODEL = "dit_guided_step", "vae_decoder"
DEFAULT_GUIDANCE_SCALE = 4.0

_TEXT, _WHOLE, _REAL = "object", "int64", "float32"
_INPUTS = {
    "labels": _WHOLE, "label_names": _TEXT, "seeds": _WHOLE, "steps": _WHOLE,
    "guidance_scale": _REAL, "sampler": _TEXT,
}  # fmt: skip


def parse_rows(inputs: dict[str, np.ndarray], facts: Facts) -> list[Row]:
    """One row for each image that a request's tensors, each (N, 1), ask for.

    Raises ValueError, one line that names the value and what is allowed.
    """
    if ("labels" in inputs) == ("label_names" in inputs):
        raise ValueError("give one of labels (numbers) and label_names")
    if "seeds" not in inputs:
        raise ValueError("seeds is missing: give one per image")
    n = len(inputs["seeds"])
    columns = {name: _column(name, tensor, n) for name, tensor in inputs.items()}
    asked = columns["labels" if "labels" in columns else "label_names"]
    labels = resolve_labels(asked, facts.num_classes, facts.label_names)
    for seed in columns["seeds"]:
        if seed < 0:
            raise ValueError(f"seed {seed} is not 0 or more")
    scales = columns.get("guidance_scale", [DEFAULT_GUIDANCE_SCALE] * n)
    for scale in scales:
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"guidance_scale {scale} is not a finite number of 0 or more")
    names = columns.get("sampler", ["ddpm"] * n)
    samplers = [choice("sampler", name, facts.samplers) for name in names]
    most = facts.diffusion.num_train_steps
    steps = columns.get("steps", [min(facts.samplers[name][0], most) for name in samplers])
    rows = zip(labels, columns["seeds"], steps, scales, samplers, strict=True)
    return [Row(facts, *values) for values in rows]


def _column(name: str, tensor: np.ndarray, n: int) -> list[Any]:
    """The values of an input, one per row. Triton gives texts as bytes in an array of objects."""
    if name not in _INPUTS:
        raise ValueError(f"input {name!r} is unknown; known are {', '.join(_INPUTS)}")
    wanted = _INPUTS[name]
    if tensor.shape != (n, 1) or tensor.dtype != wanted:
        found = f"{tensor.dtype} {tensor.shape}"
        raise ValueError(f"{name} is {found}; {wanted} {(n, 1)} is needed, a row for each seed")
    values = tensor[:, 0].tolist()
    try:
        return [value.decode() for value in values] if wanted == _TEXT else values
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: text {shown(error.object)} is not UTF-8") from None


class TritonPythonModel:
    """The class that the Python backend creates and calls."""

    def initialize(self, args: dict[str, str]) -> None:
        file = Path(args["model_repository"]) / args["model_version"] / "pipeline.json"
        values = json.loads(file.read_text(encoding="utf-8"))
        diffusion = Diffusion.from_dict(values["diffusion"])
        values |= {"shape": tuple(values["shape"]), "diffusion": diffusion}
        self.facts = Facts(**values)

    def execute(self, requests: list[Any]) -> list[Any]:
        """All requests go through the loop together, but none fails because of another's mistake.

        A client's mistake is answered with INVALID_ARG (HTTP's 400), every other error with
        INTERNAL (500). The loop ends early when all clients have cancelled their requests.
        """

        def unwanted() -> bool:
            return all(requests[i].is_cancelled() for i in asked)

        answers: list[Any] = [None] * len(requests)
        asked: dict[int, list[Row]] = {}
        for i, request in enumerate(requests):
            try:
                asked[i] = self._rows(request)
            except Exception as error:  # noqa: PERF203
                answers[i] = failed(error, mistake=isinstance(error, ValueError))
        if not asked:
            return answers
        try:
            latents = sample([row for rows in asked.values() for row in rows], _step, unwanted)
        except Exception as error:
            return [answer or failed(error, mistake=False) for answer in answers]
        for i, rows in asked.items():
            own, latents = latents[: len(rows)], latents[len(rows) :]
            try:
                answers[i] = _images(rows, own)
            except Exception as error:
                answers[i] = failed(error, mistake=False)
        return answers

    def _rows(self, request: Any) -> list[Row]:
        if (reason := refusal(request, named=True)) is not None:
            raise ValueError(reason)
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        return parse_rows(inputs, self.facts)


def _step(inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    z, x0 = _infer(STEP_MODEL, inputs, ["z_next", "x0"])
    return z, x0


def _images(rows: list[Row], latents: np.ndarray) -> Any:
    """An answer with uint8 images (N, H, W, 3) from latents (N, C, S, S)."""
    import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

    if (i := _not_finite(latents)) is not None:
        raise RuntimeError(
            f"the latents of image {i} of {len(rows)} are not finite with guidance_scale "
            f"{rows[i].scale:g}: a smaller one, or a model that is served in fp32, is needed"
        )
    (images,) = _infer(DECODER_MODEL, {"z": latents}, ["images"])
    if (i := _not_finite(images)) is not None:
        raise RuntimeError(
            f"{DECODER_MODEL}: the pixels of image {i} of {len(rows)} are not finite, though the "
            "latents are: a decoder that is served in fp32 is needed"
        )
    return pb_utils.InferenceResponse([pb_utils.Tensor("images", to_uint8(images))])


def _not_finite(images: np.ndarray) -> int | None:
    """The index of the first image that is not finite; None if all are."""
    return next((i for i, image in enumerate(images) if not np.isfinite(image).all()), None)


def _infer(model: str, inputs: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
    """Ask another model of this server. Raises RuntimeError, or Triton's own exception if the model
    is not loaded."""
    import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

    tensors = [
        # In the configurations, inputs with one number per row have the shape (N, 1).
        pb_utils.Tensor(name, value[:, None] if value.ndim == 1 else value)
        for name, value in inputs.items()
    ]
    # A model on a GPU would answer with tensors in its memory, which numpy cannot read.
    host = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)
    request = pb_utils.InferenceRequest(
        model_name=model, requested_output_names=outputs, inputs=tensors, preferred_memory=host
    )
    response = request.exec()
    if response.has_error():
        raise RuntimeError(f"{model}: {response.error().message()}")
    found = [pb_utils.get_output_tensor_by_name(response, name) for name in outputs]
    return [np.array(each.as_numpy()) for each in found]  # the response's memory is the server's
