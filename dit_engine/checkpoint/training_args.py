"""What the options of a training run mean, which its checkpoint holds beside the weights.

They hold settings that cannot be read from the tensors. The names are those of
facebookresearch/DiT ``train.py`` and ``diffusion/__init__.py``, and of diffusers' training
scripts; `dit_engine.checkpoint.options` finds them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dit_engine.arguments import positive, real_number, scalar, shown
from dit_engine.checkpoint.options import PREDICTION_FLAGS, PREDICTION_NAMES, place_of
from dit_engine.config import FAMILIES
from dit_engine.io.printable import first_line
from dit_engine.sampling.diffusion import PREDICTIONS, PUBLISHED_DIFFUSION, Diffusion

_PREDICTION_NAMES = {
    "noise": "epsilon",
    "eps": "epsilon",
    "pred_noise": "epsilon",
    "pred_epsilon": "epsilon",
    "v_pred": "v_prediction",
    "pred_v": "v_prediction",
    "x0": "sample",
    "x_start": "sample",
    "start_x": "sample",
    "pred_x0": "sample",
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
        ValueError: an option that means a diffusion which is not done here, or one without meaning.
    """
    values: dict[str, Any] = {
        field: _plain(args, name) for name, field in _DIFFUSION_FIELDS.items() if name in args
    }
    if "rescale_betas_zero_snr" in args:
        values["zero_terminal_snr"] = _is_true(args, "rescale_betas_zero_snr")
    if "diffusion_steps" in args:
        steps = _positive(args, "diffusion_steps")
        _check_told_once(args, "diffusion_steps", steps, "num_train_timesteps")
        values["num_train_steps"] = steps
        if steps != PUBLISHED_DIFFUSION.num_train_steps:  # the same noise in other steps
            scale = PUBLISHED_DIFFUSION.num_train_steps / steps
            values.setdefault("beta_start", scale * PUBLISHED_DIFFUSION.beta_start)
            values.setdefault("beta_end", scale * PUBLISHED_DIFFUSION.beta_end)
            if _is_true(args, "rescale_timesteps"):
                raise ValueError(
                    f"{place_of(args, 'rescale_timesteps')} with diffusion_steps {steps}: "
                    "only models that are given the number of the step are sampled here"
                )
    if "noise_schedule" in args:
        name = args["noise_schedule"]
        if not isinstance(name, str) or name not in _REFERENCE_SCHEDULES:
            known = ", ".join(_REFERENCE_SCHEDULES)
            raise ValueError(f"{_told(args, 'noise_schedule')} is not one of {known}")
        name = values["beta_schedule"] = _REFERENCE_SCHEDULES[name]
        _check_told_once(args, "noise_schedule", name, "beta_schedule")
    if (prediction := _prediction(args)) is not None:
        values["prediction"] = prediction
    if _is_true(args, "sigma_small") and not learn_sigma:
        values["variance"] = "fixed_small"
    try:
        return Diffusion(**values)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"args: {first_line(error)}") from None


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
            f"{_told(args, 'model')} has {theirs}; the weights have {ours} "
            "(give num_heads if the weights are right)"
        )
    return heads


def classes(args: Mapping[str, Any], rows: int) -> tuple[int, bool]:
    """(number of classes, whether one more row of the label table stands for none of them).

    rows: of the table. Raises ValueError where the options have another number of classes.
    """
    dropout = None
    if "class_dropout_prob" in args:
        dropout = real_number(args["class_dropout_prob"])
        if dropout is None or not 0 <= dropout <= 1:
            raise ValueError(f"{_told(args, 'class_dropout_prob')} is not between 0 and 1")
    if "num_classes" not in args:
        return (rows, False) if dropout == 0 else (rows - 1, True)
    number = _positive(args, "num_classes")
    needed = f"{number + 1} are needed, or {number} without a null class"
    if rows == number and dropout:
        needed = f"with {_told(args, 'class_dropout_prob')} one more is needed, for no class"
    elif rows in (number, number + 1):
        return number, rows == number + 1
    raise ValueError(
        f"{place_of(args, 'num_classes')} is {number}, and y_embedder.embedding_table has {rows} "
        f"rows; {needed}"
    )


def _prediction(args: Mapping[str, Any]) -> str | None:
    told = {}
    for flag, name in PREDICTION_FLAGS.items():
        if _is_true(args, flag):
            told.setdefault(name, flag)
    for option in PREDICTION_NAMES:
        value = args.get(option)
        # Only these two have no other meaning.
        if value is None or not (isinstance(value, str) or option.startswith("prediction")):
            continue
        name = str(value).lower().replace("-", "_")
        name = _PREDICTION_NAMES.get(name, name)
        if option == "parameterization" and name == "v":  # latent-diffusion's; elsewhere of flows
            name = "v_prediction"
        if name not in PREDICTIONS:
            raise ValueError(
                f"{_told(args, option)} is not one of {', '.join(PREDICTIONS)}, which "
                "are sampled here; give prediction if it is one by another name"
            )
        told.setdefault(name, option)
    if len(told) > 1:
        both = " and ".join(_told(args, option) for option in told.values())
        raise ValueError(f"{both} contradict each other; give prediction")
    return next(iter(told), None)


def _told(args: Mapping[str, Any], name: str) -> str:
    return f"{place_of(args, name)} {shown(args[name])}"


def _positive(args: Mapping[str, Any], name: str) -> int:
    return positive(place_of(args, name), args[name])


def _plain(args: Mapping[str, Any], name: str) -> Any:
    value = args[name]
    if isinstance(value, (list, tuple, set, Mapping)):
        raise ValueError(f"{_told(args, name)} is neither a number nor a name")
    return value


def _is_true(args: Mapping[str, Any], name: str) -> bool:
    """A switch, as scripts write one: True, 1 or "true", and their opposites."""
    value = scalar(args.get(name, False))
    text = str(value).lower() if isinstance(value, (str, int)) else ""
    if text not in ("true", "false", "1", "0"):
        raise ValueError(f"{_told(args, name)} is neither True nor False")
    return text in ("true", "1")


def _check_told_once(args: Mapping[str, Any], name: str, value: Any, other: str) -> None:
    theirs = args.get(other)
    if isinstance(theirs, (int, str)) and theirs != value:
        raise ValueError(f"{_told(args, name)} and {_told(args, other)} contradict each other")
