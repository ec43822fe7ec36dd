"""The model "dit": labels in, images out, the whole sampling loop on the server.

It is a model of Triton's Python backend. Each step is a request to the model "dit_guided_step", and
the last latents go to "vae_decoder". It needs only numpy. The file ``pipeline.json`` beside its
model.py says what was exported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_engine.arguments import choice, shown
from dit_engine.labels import resolve_labels
from dit_engine.sampling.diffusion import PUBLISHED_DIFFUSION, Diffusion
from dit_engine.sampling.schedule import make_schedule
from dit_export.server.origin import refusal
from dit_export.server.sampling import Row, sample, to_uint8

STEP_MODEL, DECODER_MODEL = "dit_guided_step", "vae_decoder"
DEFAULT_GUIDANCE_SCALE = 4.0


@dataclass(frozen=True)
class Facts:
    """The content of pipeline.json.

    Attributes:
        shape: (C, S, S) of the latents.
        learn_sigma: whether the model predicts a variance.
        samplers: name → [usual number of steps, spacing].
        diffusion: the model's; in the file, its `Diffusion.to_dict`.
    """

    shape: tuple[int, int, int]
    learn_sigma: bool
    num_classes: int
    label_names: list[str] | None
    samplers: dict[str, list[Any]]
    diffusion: Diffusion = PUBLISHED_DIFFUSION

    @classmethod
    def read(cls, path: Path) -> Facts:
        values = json.loads(path.read_text(encoding="utf-8"))
        diffusion = Diffusion.from_dict(values.get("diffusion", {}))
        return cls(**(values | {"shape": tuple(values["shape"]), "diffusion": diffusion}))


# Input → the kinds of numpy's dtypes that it may have, and their name in messages.
_TEXT, _WHOLE = ("OSU", "texts"), ("iu", "whole numbers")
_INPUTS = {
    "labels": _WHOLE,
    "label_names": _TEXT,
    "seeds": _WHOLE,
    "steps": _WHOLE,
    "guidance_scale": ("fiu", "real numbers"),
    "sampler": _TEXT,
}


def parse_rows(inputs: dict[str, np.ndarray], facts: Facts) -> list[Row]:
    """One row for each image that a request's tensors, each (N, 1), ask for.

    Raises ValueError, one line that names the value and what is allowed.
    """
    columns = {name: _column(name, tensor) for name, tensor in inputs.items()}
    if ("labels" in columns) == ("label_names" in columns):
        raise ValueError("give one of labels (numbers) and label_names")
    if "seeds" not in columns:
        raise ValueError("seeds is missing: give one per image")
    asked = columns["labels"] if "labels" in columns else columns["label_names"]
    labels = resolve_labels(asked, facts.num_classes, facts.label_names)
    n = len(labels)
    for name, column in columns.items():
        if len(column) != n:
            raise ValueError(f"{name} has {len(column)} rows for {n} labels; one each is needed")
    for seed in columns["seeds"]:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed} is not a whole number from 0 to {2**63 - 1}")
    scales = columns.get("guidance_scale", [DEFAULT_GUIDANCE_SCALE] * n)
    for scale in scales:
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"guidance_scale {scale} is not a finite number of 0 or more")
    names = columns.get("sampler", ["ddpm"] * n)
    samplers = [choice("sampler", name, facts.samplers) for name in names]
    spacings = [facts.samplers[name][1] for name in samplers]
    most = facts.diffusion.num_train_steps
    steps = columns.get("steps", [min(facts.samplers[name][0], most) for name in samplers])
    for count, spacing in zip(steps, spacings, strict=True):
        make_schedule(count, spacing, facts.diffusion)  # raises for a number that it cannot make
    rows = zip(labels, columns["seeds"], steps, scales, samplers, spacings, strict=True)
    return [Row(*values) for values in rows]


def _column(name: str, tensor: np.ndarray) -> list[Any]:
    """The values of an input, one per row."""
    if name not in _INPUTS:
        raise ValueError(f"input {name!r} is unknown; known are {', '.join(_INPUTS)}")
    if tensor.ndim == 0 or tensor.shape[1:] not in ((), (1,)):
        raise ValueError(f"{name} has shape {tensor.shape}; (N, 1) is needed, one row per image")
    kinds, wanted = _INPUTS[name]
    if tensor.dtype.kind not in kinds:
        raise ValueError(f"{name} holds {tensor.dtype}; {wanted} are needed")
    values = tensor.reshape(-1).tolist()
    return [_text(name, value) for value in values] if _INPUTS[name] is _TEXT else values


def _text(name: str, value: Any) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{name}: text {shown(value)} is not UTF-8") from None
    if not isinstance(value, str):
        raise ValueError(f"{name} holds {shown(value)}; text is needed")
    return value


class Failed(Exception):
    """An error that is not the client's mistake, such as that of another model of this server."""


class TritonPythonModel:
    """The class that the Python backend creates and calls."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"]) / args["model_version"]
        self.facts = Facts.read(folder / "pipeline.json")

    def execute(self, requests: list[Any]) -> list[Any]:
        """All requests go through the loop together, but none fails for another's mistake.

        A client's mistake is answered with INVALID_ARG (HTTP's 400), every other error with
        INTERNAL (500).
        """
        asked = [self._rows(request) for request in requests]
        good = {i: rows for i, rows in enumerate(asked) if isinstance(rows, list)}

        def unwanted() -> bool:
            return all(requests[i].is_cancelled() for i in good)

        made = dict(zip(good, self._images(list(good.values()), unwanted), strict=True))
        results = (made[i] if isinstance(rows, list) else rows for i, rows in enumerate(asked))
        return [_response(result) for result in results]

    def _rows(self, request: Any) -> list[Row] | Exception:
        try:
            if (reason := refusal(request, named=True)) is not None:
                return ValueError(reason)
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            return parse_rows(inputs, self.facts)
        except ValueError as error:
            return error
        except Exception as error:  # a fault of ours, which must not fail the other requests
            return Failed(f"{type(error).__name__}: {error}")

    def _images(
        self, requests: list[list[Row]], unwanted: Callable[[], bool]
    ) -> list[np.ndarray | Exception]:
        """For each request, uint8 images (N, H, W, 3) or the error."""
        if not requests:
            return []

        def step(inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
            z, x0 = _infer(STEP_MODEL, inputs, ["z_next", "x0"])
            return z, x0

        rows, facts = [row for part in requests for row in part], self.facts
        try:
            latents, lost = sample(
                rows, facts.shape, facts.learn_sigma, step, unwanted, facts.diffusion
            )  # latents (ΣN, C, S, S)
        except Exception as error:
            failed = error if isinstance(error, Failed) else Failed(f"the sampling loop: {error}")
            return [failed] * len(requests)
        made, first = list[np.ndarray | Exception](), 0
        for part in requests:
            places = {i: lost[first + i] for i in range(len(part)) if first + i in lost}
            images = latents[first : first + len(part)]
            made.append(_not_finite(part, places) if places else _decode(images))
            first += len(part)
        return made


def _response(result: np.ndarray | Exception) -> Any:
    import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

    if isinstance(result, Exception):
        message = " ".join(str(result).split()) or type(result).__name__
        codes = pb_utils.TritonError
        code = codes.INVALID_ARG if isinstance(result, ValueError) else codes.INTERNAL
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("images", result)])


def _not_finite(rows: list[Row], places: dict[int, int]) -> Failed:
    """places: number of the image in its request → the first step that was not finite."""
    i, step = min(places.items(), key=lambda place: place[1])
    images = "image" if len(places) == 1 else "images"
    return Failed(
        f"the latents of {images} {', '.join(map(str, places))} of {len(rows)} are not finite, "
        f"first at step {step + 1} of {rows[i].steps} with guidance_scale {rows[i].scale:g}: "
        "a smaller guidance_scale, or a model that is served in fp32, is needed"
    )


def _decode(latents: np.ndarray) -> np.ndarray | Exception:
    """Latents (N, C, S, S) → uint8 images (N, H, W, 3), or the error."""
    try:
        (images,) = _infer(DECODER_MODEL, {"z": latents}, ["images"])
    except Failed as error:
        return error
    wrong = [str(i) for i, image in enumerate(images) if not np.isfinite(image).all()]
    if wrong:
        numbers = f"image{'s' * (len(wrong) > 1)} {', '.join(wrong)} of {len(images)}"
        return Failed(
            f"{DECODER_MODEL}: the pixels of {numbers} are not finite, though the latents are: "
            "a decoder that is served in fp32 is needed"
        )
    return to_uint8(images)


def _infer(model: str, inputs: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
    """Ask another model of this server. Raises `Failed`."""
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
    try:
        response = request.exec()
    except pb_utils.TritonModelException as error:  # it is not loaded
        raise Failed(f"{model}: {error}") from None
    if response.has_error():
        raise Failed(f"{model}: {response.error().message()}")
    found = [pb_utils.get_output_tensor_by_name(response, name) for name in outputs]
    return [np.array(each.as_numpy()) for each in found]  # the response's memory is the server's
