"""The options of a training run, which its checkpoints hold beside the weights.

They tell what no tensor does. The names are those of facebookresearch/DiT ``train.py`` and
``diffusion/__init__.py``, of diffusers' training scripts, and, so that they can be refused, of the
flow models whose checkpoints have exactly DiT's keys (willisma/SiT and what was made of it).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any

from dit_engine.checkpoint.weights import one_line
from dit_engine.config import FAMILIES
from dit_engine.diffusion import PREDICTIONS, PUBLISHED_DIFFUSION, Diffusion

# Where a checkpoint has them: the published scripts, Lightning.
PLACES = ("args", "hyper_parameters")
# Models of DiT's build that predict along a flow, by the beginning of their names.
_FLOW_MODEL = re.compile(r"(SiT|REPA|LightningDiT|MeanFlow|JiT)(?![a-z])", re.IGNORECASE)
_NO_FLOWS = (
    "it has a DiT's tensors, and predicts along a flow in a time from 0 to 1; this engine samples "
    f"models that undo noise step by step and predict {', '.join(PREDICTIONS)}"
)
_PREDICTION_NAMES = {
    "noise": "epsilon",
    "eps": "epsilon",
    "v-prediction": "v_prediction",
    "x0": "sample",
    "x_start": "sample",
}
# Options by which diffusers' scripts name fields of `Diffusion`, and the reference's schedules.
_DIFFUSION_FIELDS = {
    "num_train_timesteps": "num_train_steps",
    "beta_schedule": "beta_schedule",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "rescale_betas_zero_snr": "zero_terminal_snr",
}
_REFERENCE_SCHEDULES = {
    "linear": "linear",
    "squaredcos_cap_v2": "squaredcos_cap_v2",
    "cosine": "squaredcos_cap_v2",
}


def options_of(
    content: Mapping[Any, Any], file_name: str, prediction: str | None = None
) -> dict[str, Any]:
    """The options in what a weight file holds, None left out; empty where there are none.

    prediction: what the user says that the model predicts, which then stands in their place.

    Raises:
        ValueError: the options, or the name of the file alone, are those of a flow model.
    """
    args: dict[str, Any] = {}
    for place in reversed(PLACES):
        found = content.get(place)
        found = vars(found) if isinstance(found, argparse.Namespace) else found
        if isinstance(found, Mapping):
            args = {str(key): value for key, value in found.items() if value is not None}
    name = args.get("model")
    named = _FLOW_MODEL.match(name) if isinstance(name, str) else None
    if named or "path_type" in args:
        keys = ("model", "path_type", "prediction")
        told = ", ".join(f"args.{key} {_shown(args[key])}" for key in keys if key in args)
        kind = f"{named[1]}" if named else "flow model"
        raise ValueError(f"a {kind} checkpoint ({told}); {_NO_FLOWS}")
    if prediction is not None:
        others = {"predict_xstart", "prediction_type"}
        return {k: v for k, v in args.items() if k not in others} | {"prediction": prediction}
    if "model" not in args and (named := _FLOW_MODEL.match(file_name)):
        raise ValueError(
            f"a {named[1]} checkpoint, by its name; {_NO_FLOWS} (give prediction if it is none)"
        )
    return args


def check_prediction(prediction: str | None) -> None:
    """Raise ValueError for an option ``prediction`` that is not one of `PREDICTIONS`, or None."""
    if prediction is not None and prediction not in PREDICTIONS:
        raise ValueError(
            f"prediction {prediction!r}: choose one of {', '.join(PREDICTIONS)}; flow models, "
            "which predict a velocity or a score over a path, are not sampled here"
        )


def trained_diffusion(args: Mapping[str, Any], learn_sigma: bool) -> Diffusion:
    """The diffusion that the model was trained with; the published one where nothing is said.

    Raises:
        ValueError: an option that means a diffusion which is not done here, or of no meaning.
    """
    values: dict[str, Any] = {
        field: args[name] for name, field in _DIFFUSION_FIELDS.items() if name in args
    }
    if "diffusion_steps" in args:
        steps = values["num_train_steps"] = _positive(args, "diffusion_steps")
        if steps != PUBLISHED_DIFFUSION.num_train_steps:  # the same noise in other steps
            scale = PUBLISHED_DIFFUSION.num_train_steps / steps
            values.setdefault("beta_start", scale * PUBLISHED_DIFFUSION.beta_start)
            values.setdefault("beta_end", scale * PUBLISHED_DIFFUSION.beta_end)
            if args.get("rescale_timesteps") is True:
                raise ValueError(
                    f"args.rescale_timesteps with diffusion_steps {steps}: only models that are "
                    "given the number of the step are sampled here"
                )
    if "noise_schedule" in args:
        name = args["noise_schedule"]
        if not isinstance(name, str) or name not in _REFERENCE_SCHEDULES:
            known = ", ".join(_REFERENCE_SCHEDULES)
            raise ValueError(f"args.noise_schedule {_shown(name)} is not one of {known}")
        values["beta_schedule"] = _REFERENCE_SCHEDULES[name]
    if (prediction := _prediction(args)) is not None:
        values["prediction"] = prediction
    if args.get("sigma_small") is True and not learn_sigma:
        values["variance"] = "fixed_small"
    try:
        return Diffusion(**values)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"args: {one_line(error)}") from None


def model_heads(args: Mapping[str, Any], found: Mapping[str, int]) -> int | None:
    """Heads as the options tell them, by number or by the name of a published size; else None.

    found: depth, hidden_size and patch_size of the weights. Raises ValueError where the name is
    that of another size.
    """
    if "num_heads" in args:
        return _positive(args, "num_heads")
    name = args.get("model")
    size = r"(?:DiT[-_])?(S|B|L|XL)[/-](\d{1,2})"
    if not isinstance(name, str) or not (match := re.fullmatch(size, name)):
        return None
    depth, hidden_size, heads = FAMILIES[match[1]]
    expected = {"depth": depth, "hidden_size": hidden_size, "patch_size": int(match[2])}
    if found != expected:
        ours, theirs = (", ".join(f"{k} {v}" for k, v in d.items()) for d in (found, expected))
        raise ValueError(
            f"args.model {name!r} has {theirs}; the weights have {ours} "
            "(give num_heads if the weights are right)"
        )
    return heads


def classes(args: Mapping[str, Any], rows: int) -> tuple[int, bool]:
    """(number of classes, whether one more row of the label table stands for none of them).

    rows: of the table. Raises ValueError where the options have another number of classes.
    """
    dropout = args.get("class_dropout_prob")
    if "num_classes" not in args:
        without = isinstance(dropout, (int, float)) and dropout == 0
        return (rows, False) if without else (rows - 1, True)
    number = _positive(args, "num_classes")
    if rows not in (number, number + 1):
        raise ValueError(
            f"args.num_classes is {number}, and y_embedder.embedding_table has {rows} rows; "
            f"{number + 1} are needed, or {number} without a null class"
        )
    return number, rows == number + 1


def _prediction(args: Mapping[str, Any]) -> str | None:
    if args.get("predict_xstart") is True:
        return "sample"
    for key in ("prediction_type", "prediction"):
        if key in args:
            value = args[key]
            name = _PREDICTION_NAMES.get(value, value) if isinstance(value, str) else None
            if name not in PREDICTIONS:
                raise ValueError(
                    f"args.{key} {_shown(value)} is not one of {', '.join(PREDICTIONS)}, which "
                    "are sampled here; give prediction if it is one by another name"
                )
            return name
    return None


def _shown(value: Any) -> str:
    """On one line, whatever it is."""
    plain = isinstance(value, (str, int, float))
    return repr(value)[:60] if plain else f"of type {type(value).__name__}"


def _positive(args: Mapping[str, Any], name: str) -> int:
    value = args[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"args.{name} {_shown(value)} is not a positive integer")
    return value
