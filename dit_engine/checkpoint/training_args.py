"""What the options of a training say of the model that cannot be read from its tensors.

The names are those of facebookresearch/DiT ``train.py`` and ``diffusion/__init__.py``, and of
diffusers' training scripts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dit_engine.arguments import real_number
from dit_engine.checkpoint.options import PREDICTION_FLAGS, PREDICTION_NAMES, Options
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


def trained_diffusion(args: Options, learn_sigma: bool) -> Diffusion:
    """The diffusion that the model was trained with; the published one where no option says more.

    Raises ValueError for an option without meaning, or of a diffusion that is not sampled here.
    """
    values: dict[str, Any] = {}
    for name, field in _DIFFUSION_FIELDS.items():
        if isinstance(args.get(name), (list, tuple, set, Mapping)):
            raise ValueError(f"{args.told(name)} is neither a number nor a name")
        if name in args:
            values[field] = args[name]
    if "rescale_betas_zero_snr" in args:
        values["zero_terminal_snr"] = args.is_true("rescale_betas_zero_snr")
    if "diffusion_steps" in args:
        steps = args.positive("diffusion_steps")
        args.check_same("diffusion_steps", steps, "num_train_timesteps")
        values["num_train_steps"] = steps
        if steps != PUBLISHED_DIFFUSION.num_train_steps:  # the same noise in other steps
            scale = PUBLISHED_DIFFUSION.num_train_steps / steps
            values.setdefault("beta_start", scale * PUBLISHED_DIFFUSION.beta_start)
            values.setdefault("beta_end", scale * PUBLISHED_DIFFUSION.beta_end)
            if args.is_true("rescale_timesteps"):
                raise ValueError(
                    f"{args.place('rescale_timesteps')} with diffusion_steps {steps}: "
                    "only models that are given the number of the step are sampled here"
                )
    if "noise_schedule" in args:
        name = args["noise_schedule"]
        if not isinstance(name, str) or name not in _REFERENCE_SCHEDULES:
            known = ", ".join(_REFERENCE_SCHEDULES)
            raise ValueError(f"{args.told('noise_schedule')} is not one of {known}")
        name = values["beta_schedule"] = _REFERENCE_SCHEDULES[name]
        args.check_same("noise_schedule", name, "beta_schedule")
    if (prediction := _prediction(args)) is not None:
        values["prediction"] = prediction
    if args.is_true("sigma_small") and not learn_sigma:
        values["variance"] = "fixed_small"
    try:
        return Diffusion(**values)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"args: {first_line(error)}") from None


def model_heads(args: Options, found: Mapping[str, int]) -> int | None:
    """The number of heads, from an option for it or from the name of a published size; else None.

    found: depth, hidden_size and patch_size of the weights. Raises ValueError if the name belongs
    to another size.
    """
    if "num_heads" in args:
        return args.positive("num_heads")
    name = args.get("model")
    size = r"(?:DiT[-_])?(S|B|L|XL)[/-](\d{1,2})"
    if not isinstance(name, str) or not (match := re.fullmatch(size, name)):
        return None
    depth, hidden_size, heads = FAMILIES[match[1]]
    expected = {"depth": depth, "hidden_size": hidden_size, "patch_size": int(match[2])}
    if found != expected:
        ours, theirs = (", ".join(f"{k} {v}" for k, v in d.items()) for d in (found, expected))
        raise ValueError(
            f"{args.told('model')} has {theirs}; the weights have {ours} "
            "(give num_heads if the weights are right)"
        )
    return heads


def classes(args: Options, rows: int) -> tuple[int, bool]:
    """(number of classes, whether the label table has one more row, for no class).

    rows: of the table. Raises ValueError if the options name another number of classes.
    """
    dropout = None
    if "class_dropout_prob" in args:
        dropout = real_number(args["class_dropout_prob"])
        if dropout is None or not 0 <= dropout <= 1:
            raise ValueError(f"{args.told('class_dropout_prob')} is not between 0 and 1")
    if "num_classes" not in args:
        return (rows, False) if dropout == 0 else (rows - 1, True)
    number = args.positive("num_classes")
    needed = f"{number + 1} are needed, or {number} without a null class"
    if rows == number and dropout:
        needed = f"with {args.told('class_dropout_prob')} one more is needed, for no class"
    elif rows in (number, number + 1):
        return number, rows == number + 1
    raise ValueError(
        f"{args.place('num_classes')} is {number}, and y_embedder.embedding_table has {rows} "
        f"rows; {needed}"
    )


def _prediction(args: Options) -> str | None:
    told = {}
    for flag, name in PREDICTION_FLAGS.items():
        if args.is_true(flag):
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
                f"{args.told(option)} is not one of {', '.join(PREDICTIONS)}, which "
                "are sampled here; give prediction if it is one by another name"
            )
        told.setdefault(name, option)
    if len(told) > 1:
        both = " and ".join(args.told(option) for option in told.values())
        raise ValueError(f"{both} contradict each other; give prediction")
    return next(iter(told), None)
