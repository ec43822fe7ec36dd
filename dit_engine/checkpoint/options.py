"""Find the options of a training in its checkpoint, and refuse flow models by them.

Flow models (willisma/SiT and its descendants) have exactly DiT's keys. Only these options and the
name of the file tell them from a DiT.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dit_engine.arguments import positive, scalar, shown
from dit_engine.checkpoint.wrappers import levels
from dit_engine.sampling.diffusion import PREDICTIONS

# Names under which training scripts save their options, beside the weights.
PLACES = (
    "args", "hyper_parameters", "hyperparameters", "hparams", "config", "cfg", "conf", "opt",
    "opts", "options", "training_args", "train_args", "training_config", "train_config",
    "model_args", "model_config", "model_kwargs",
)  # fmt: skip
# Options that say what is predicted, by the names in SiT, diffusers' training scripts,
# denoising-diffusion-pytorch and latent-diffusion.
PREDICTION_NAMES = (
    "prediction_type", "prediction", "objective", "parameterization", "pred_type", "predict_type",
    "prediction_target", "model_output", "mean_type", "model_mean_type",
)  # fmt: skip
PREDICTION_FLAGS = {
    **dict.fromkeys(("predict_xstart", "predict_x0"), "sample"),
    **dict.fromkeys(("predict_v", "v_pred", "v_prediction", "v_parameterization"), "v_prediction"),
}
# Options by which diffusers' scripts name fields of `Diffusion`.
DIFFUSION_FIELDS = {
    "num_train_timesteps": "num_train_steps",
    "beta_schedule": "beta_schedule",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "rescale_betas_zero_snr": "zero_terminal_snr",
}
_READ = {
    *PREDICTION_NAMES, *PREDICTION_FLAGS, *DIFFUSION_FIELDS, "num_classes", "class_dropout_prob",
    "num_heads", "diffusion_steps", "noise_schedule", "rescale_timesteps", "sigma_small",
}  # fmt: skip
_MODEL_NAMES = ("model", "model_name", "model_type", "arch", "architecture", "network", "name")
# Groups of options that belong to other networks, or to the optimizer.
_OTHERS = re.compile(r"vae|autoencoder|first_stage|text|clip|optim|(^|_)lr(_|$)|discriminator")
# Options whose values people choose freely.
_FREE = re.compile(r"(dir|path|root|file|folder|ckpt|checkpoint|resume|project|entity|dataset|"
                   r"tags?|notes?)$|^(exp|run|wandb|comment|desc)")  # fmt: skip
_NAMES = "SiT|REPA|LightningDiT|MeanFlow|JiT"
_SIZE = r"[-_/](?:XS|S|B|L|XL|XXL|H|G)"
# Models with DiT's layers that predict along a flow. In another spelling than their own they need
# a size behind the name, because "jit" and "repa" may be anything.
_FLOW_MODEL = re.compile(
    rf"(?<![A-Za-z0-9])(?:({_NAMES})(?![a-z])|(?i:({_NAMES}){_SIZE}(?![a-z])))"
)
_FLOW_FILE = re.compile(rf"(?i)(?<![a-z0-9])({_NAMES}){_SIZE}[-_]?(?:\d|imagenet)")
_FLOW_WORD = re.compile(r"(?i)(?<![a-z])(?:flow(?!er)|rectified|velocity|interpolant)")
_FLOW_OPTION = re.compile(
    r"(?:^|_)(?:path_type|flows?|rectified|velocity|interpolant|transport|cfm)(?:_|$)|flow_?match"
)
_NO_FLOWS = (
    "it has a DiT's tensors, and predicts along a flow in a time from 0 to 1; this engine samples "
    f"models that undo noise step by step and predict {', '.join(PREDICTIONS)}"
)
_UNLESS = " (give prediction if it is none)"
_DEEPEST = 6

Option = tuple[str, str, Any]  # its place in the file, for messages, its name and its value


class Options(dict[str, Any]):
    """The options that are read, by name; ``places`` says where in the file each of them is."""

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        super().__init__(values or {})
        self.places: dict[str, str] = {}

    def place(self, name: str) -> str:
        return self.places.get(name, f"args.{name}")

    def told(self, name: str) -> str:
        """An option and its value, for a message."""
        return f"{self.place(name)} {shown(self[name])}"

    def positive(self, name: str) -> int:
        return positive(self.place(name), self[name])

    def is_true(self, name: str) -> bool:
        """A switch as scripts write one: True, 1 or "true", or their opposites; off if missing."""
        value = scalar(self.get(name, False))
        text = str(value).lower() if isinstance(value, (str, int)) else ""
        if text not in ("true", "false", "1", "0"):
            raise ValueError(f"{self.told(name)} is neither True nor False")
        return text in ("true", "1")

    def check_same(self, name: str, value: Any, other: str) -> None:
        """Raise ValueError if the option ``other`` is there and is not ``value``."""
        theirs = self.get(other)
        if isinstance(theirs, (int, str)) and theirs != value:
            raise ValueError(f"{self.told(name)} and {self.told(other)} contradict each other")


def options_of(
    content: Mapping[Any, Any],
    file_name: str,
    prediction: str | None = None,
    num_heads: int | None = None,
) -> Options:
    """The options in what a weight file holds, without those that are None.

    prediction, num_heads: what the user gives, which replaces what the options say. Raises
    ValueError for a flow model, and if two options of one name have different values.
    """
    options = list(_all_options(content))
    _refuse_flow_models(options, trusted=prediction is not None)
    ignored: set[str] = set() if num_heads is None else {"num_heads"}
    if prediction is not None:
        ignored |= {*PREDICTION_NAMES, *PREDICTION_FLAGS}
    read = Options()
    for place, name, value in options:
        if name not in _READ or name in ignored:
            continue
        known, plain = read.get(name, value), (str, int, float)
        both_plain = isinstance(known, plain) and isinstance(value, plain)
        if known is not value and not (both_plain and known == value):
            raise ValueError(
                "the options of its training contradict each other: "
                f"{read.told(name)}, {place} {shown(value)}"
            )
        read.setdefault(name, value)
        read.places.setdefault(name, place)
    names = [o for o in options if o[1] in _MODEL_NAMES and isinstance(o[2], str)]
    for place, _, value in sorted(names, key=lambda option: "DiT" not in option[2])[:1]:
        read["model"], read.places["model"] = value, place
    if prediction is not None:
        read["prediction"] = prediction
    elif "model" not in read and (named := _FLOW_FILE.search(file_name)):
        raise ValueError(f"a {named[1]} checkpoint, by its name; {_NO_FLOWS}{_UNLESS}")
    return read


def _refuse_flow_models(options: list[Option], trusted: bool) -> None:
    """trusted: the user says what is predicted, so only the names of models and paths count."""
    found, kind, certain = [], "flow model", False
    for option in options:
        _, name, value = option
        if _FREE.search(name):
            continue
        text = value if isinstance(value, str) else ""
        if match := _FLOW_MODEL.search(text):
            kind = match[1] or match[2]
        word = name not in PREDICTION_NAMES and _FLOW_WORD.search(text)
        plain = isinstance(value, (str, int, float, Mapping, list, tuple))
        on = not plain or (value and text.lower() not in ("0", "no", "none", "off", "false"))
        if match or word or (_FLOW_OPTION.search(name) and on):
            found.append(option)
            certain = certain or bool(match) or name == "path_type"
    if found and (certain or not trusted):
        found = found[:2] + [option for option in options if option[1] == "prediction"][:1]
        told = ", ".join(f"{place} {shown(value)}" for place, _, value in found)
        raise ValueError(f"a {kind} checkpoint ({told}); {_NO_FLOWS}{'' if certain else _UNLESS}")


def _all_options(content: Mapping[Any, Any]) -> Iterator[Option]:
    """All options in `PLACES`, and the plain values in every dict that may hold the weights."""
    seen: set[int] = set()
    for _, level in levels(content):
        for name, value in level.items():
            if name in PLACES:
                yield from _options_in(value, name, name, seen)
            elif isinstance(name, str) and isinstance(value, (str, int, float)):
                yield _written(name), name, value


def _options_in(value: Any, place: str, name: str, seen: set[int]) -> Iterator[Option]:
    """``value`` itself, unless it only holds others, and the options that it holds."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    inner: Iterable[Option] = ()  # not a list, because many options may be one dict
    if isinstance(value, Mapping):
        inner = ((f"{place}.{_written(str(key))}", str(key), v) for key, v in value.items())
    elif isinstance(value, (list, tuple)):
        inner = ((place, name, v) for v in value if isinstance(v, (str, Mapping)))
    container = isinstance(value, (Mapping, list, tuple))
    if value is not None and not (container and name in PLACES):
        yield place, name, value
    if name in _READ or id(value) in seen or place.count(".") > _DEEPEST:
        return
    if isinstance(value, Mapping) and "param_groups" in value:  # the state of an optimizer
        return
    if container:
        seen.add(id(value))
    for its_place, its_name, v in inner:
        many = isinstance(v, (Mapping, list, tuple, argparse.Namespace))
        if not (many and _OTHERS.search(its_name)):
            yield from _options_in(v, its_place, its_name, seen)


def _written(name: str) -> str:
    return name if re.fullmatch(r"[\w-]{1,40}", name) else shown(name)[:40]
