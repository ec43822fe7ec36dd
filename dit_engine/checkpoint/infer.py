"""Read a network's config from its tensors and the options of its training, without a config.json.

The options' names are those of facebookresearch/DiT ``train.py`` and ``diffusion/__init__.py``, and
of diffusers' training scripts.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from dit_engine.arguments import real_number
from dit_engine.checkpoint.options import (
    DIFFUSION_FIELDS,
    PREDICTION_FLAGS,
    PREDICTION_NAMES,
    Options,
)
from dit_engine.config import FAMILIES, ModelConfig
from dit_engine.io.printable import first_line, some_of
from dit_engine.sampling.diffusion import PREDICTIONS, PUBLISHED_DIFFUSION, Diffusion

_OTHER_WORDS = {
    **dict.fromkeys(("noise", "eps", "pred_noise", "pred_epsilon"), "epsilon"),
    **dict.fromkeys(("v_pred", "pred_v"), "v_prediction"),
    **dict.fromkeys(("x0", "x_start", "start_x", "pred_x0"), "sample"),
}
_REFERENCE_SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "squaredcos_cap_v2",
                        "cosine": "squaredcos_cap_v2"}  # fmt: skip


def infer_config(
    state: Mapping[str, Tensor], num_heads: int | None = None, args: Options | None = None
) -> ModelConfig:
    """The config of an official state dict, from its shapes and the options of its training.

    The shapes do not tell the number of heads. It is ``num_heads`` if given, or what ``args`` say,
    or what `infer_heads` finds. Raises ValueError where a needed key is missing or has an unknown
    shape, the width leaves the heads open, or ``args`` are those of another model.
    """
    args = args or Options()

    def shape(key: str, dimensions: int) -> torch.Size:
        if key not in state:
            raise ValueError(f"no DiT, key {key!r} is missing; it holds {some_of(state)}")
        if state[key].ndim != dimensions or not state[key].numel():
            raise ValueError(
                f"{key} is {tuple(state[key].shape)}, not of {dimensions} dimensions above 0"
            )
        return state[key].shape

    hidden_size, in_channels, p, _ = shape("x_embedder.proj.weight", 4)
    tokens = shape("pos_embed", 3)[1]
    if math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"pos_embed holds {tokens} tokens, which is no square")
    outputs, needed = shape("final_layer.linear.weight", 2)[0], p * p * in_channels
    if outputs not in (needed, 2 * needed):
        raise ValueError(
            f"final_layer.linear gives {outputs} values a token; patch {p} and {in_channels} "
            f"channels need {needed} or {2 * needed}"
        )
    mlp_hidden_size = shape("blocks.0.mlp.fc1.weight", 2)[0]
    mlp_ratio = mlp_hidden_size / hidden_size
    if int(hidden_size * mlp_ratio) < mlp_hidden_size:  # the quotient was rounded down
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    depth = count_blocks(state, r"blocks\.(\d+)\.")
    told = {"depth": depth, "hidden_size": hidden_size, "patch_size": p}
    num_classes, null_class = _classes(args, shape("y_embedder.embedding_table.weight", 2)[0])
    return ModelConfig(
        depth=depth,
        hidden_size=hidden_size,
        patch_size=p,
        num_heads=num_heads or _named_heads(args, told) or infer_heads(hidden_size),
        input_size=math.isqrt(tokens) * p,
        in_channels=in_channels,
        num_classes=num_classes,
        mlp_ratio=mlp_ratio,
        learn_sigma=outputs == 2 * needed,
        diffusion=_trained_diffusion(args, outputs == 2 * needed),
        has_null_class=null_class,
    )


def infer_heads(hidden_size: int) -> int:
    """Heads for a width: those of a published width (384, 768, 1024, 1152), or else heads of 64 or
    72 numbers if only one of these divides it, with a warning; else ValueError."""
    published = {width: heads for _, width, heads in FAMILIES.values()}
    if hidden_size in published:
        return published[hidden_size]
    fitting = [d for d in (64, 72) if hidden_size % d == 0]
    if len(fitting) != 1:
        raise ValueError(
            f"hidden size {hidden_size} does not tell the number of heads "
            f"({'both' if fitting else 'neither'} 64 and 72 divide it); give num_heads"
        )
    heads = hidden_size // fitting[0]
    warnings.warn(
        f"hidden size {hidden_size} is none of the published ones; "
        f"taking {heads} heads of {fitting[0]} (give num_heads if it has others)",
        stacklevel=2,
    )
    return heads


def count_blocks(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many blocks the keys name, which must be 0, 1, …; the pattern captures the number."""
    found = {int(match[1]) for key in state if (match := re.match(pattern, key))}
    for expected, number in enumerate(sorted(found)):
        if number != expected:
            raise ValueError(f"block {expected} is missing, block {number} is there")
    if not found:
        raise ValueError(f"holds no block; it holds {some_of(state)}")
    return len(found)


def _trained_diffusion(args: Options, learn_sigma: bool) -> Diffusion:
    """The diffusion that the model was trained with; by default the published one."""
    for name in DIFFUSION_FIELDS:
        if isinstance(args.get(name), (list, tuple, set, Mapping)):
            raise ValueError(f"{args.told(name)} is neither a number nor a name")
    values = {field: args[name] for name, field in DIFFUSION_FIELDS.items() if name in args}
    if "zero_terminal_snr" in values:
        values["zero_terminal_snr"] = args.is_true("rescale_betas_zero_snr")
    if "diffusion_steps" in args:
        steps = values["num_train_steps"] = args.positive("diffusion_steps")
        args.check_same("diffusion_steps", steps, "num_train_timesteps")
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


def _prediction(args: Options) -> str | None:
    told: dict[str, str] = {}  # what is predicted → the first option that says so
    for flag, name in PREDICTION_FLAGS.items():
        if args.is_true(flag):
            told.setdefault(name, flag)
    for option in PREDICTION_NAMES:
        value = args.get(option)
        # Only these two have no other meaning.
        if value is None or not (isinstance(value, str) or option.startswith("prediction")):
            continue
        name = str(value).lower().replace("-", "_")
        name = _OTHER_WORDS.get(name, name)
        if option == "parameterization" and name == "v":  # latent-diffusion's; elsewhere a flow's
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


def _named_heads(args: Options, found: Mapping[str, int]) -> int | None:
    """The number of heads, from an option for it or from the name of a published size, which must
    have the depth, hidden_size and patch_size that were ``found`` in the weights; else None."""
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


def _classes(args: Options, rows: int) -> tuple[int, bool]:
    """(number of classes, whether one more of the label table's ``rows`` is for no class)."""
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
