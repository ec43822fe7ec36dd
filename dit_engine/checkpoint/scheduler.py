"""Read the `Diffusion` from a diffusers pipeline's ``scheduler_config.json``.

Betas and prediction belong to the model, and are read from every scheduler of a noise-predicting
diffusion. Settings of sampling are read so that ddim, ddpm and dpm++ give the images that
DiTPipeline gives with its DDIM, DDPM and DPMSolverMultistep schedulers; what they cannot give is
refused. The settings of other solvers are ignored, because nothing here samples with them.
"""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

from dit_engine.config import ModelConfig
from dit_engine.io.json_files import read_json
from dit_engine.io.printable import one_line
from dit_engine.sampling.diffusion import OWN_SPACINGS, Diffusion

CONFIG = "scheduler_config.json"

# Scheduler class → our sampler.
_SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DDPMParallelScheduler": "ddpm",
    "DPMSolverMultistepScheduler": "dpm++",
}
# Schedulers of the same diffusion whose solvers we do not have. The second group has other default
# betas.
_OTHERS = (
    "DEISMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
_LATENT_BETAS = (
    "DPMSolverSDEScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
)  # fmt: skip
_CLIPPING = ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler",
             "HeunDiscreteScheduler")  # fmt: skip
CLASSES = (*_SAMPLERS, *_OTHERS, *_LATENT_BETAS)

# Key → field of `Diffusion`.
_FIELDS = {
    **{key: key for key in ("beta_start", "beta_end", "beta_schedule", "trained_betas",
                            "steps_offset")},
    "num_train_timesteps": "num_train_steps",
    "prediction_type": "prediction",
    "rescale_betas_zero_snr": "zero_terminal_snr",
}  # fmt: skip
# Key → the values that every scheduler may have, diffusers' default first; then the further values
# that Euler and dpm++ may have.
_OFF = (False, None)
_NEEDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "": {"thresholding": _OFF, "use_flow_sigmas": _OFF},
    "EulerDiscreteScheduler": {"timestep_type": ("discrete",)},
    "DPMSolverMultistepScheduler": {
        "solver_order": (2,),
        "algorithm_type": ("dpmsolver++", "deis"),
        "solver_type": ("midpoint", "logrho", "bh1", "bh2"),  # all are taken for the first
        "final_sigmas_type": ("zero",),
        "lambda_min_clipped": (-math.inf, "-Infinity", "-inf", None),
        "use_karras_sigmas": _OFF,
        "use_exponential_sigmas": _OFF,
        "use_beta_sigmas": _OFF,
        "use_lu_lambdas": _OFF,
    },
}
_VARIANCES = {"fixed_small": "fixed_small", "fixed_small_log": "fixed_small",
              "fixed_large": "fixed_large", "learned_range": "model"}  # fmt: skip
_WITHOUT_EFFECT = (
    "dynamic_thresholding_ratio", "sample_max_value",  # of thresholding
    "lower_order_final", "euler_at_final",  # the last step goes to no noise, in first order
    "flow_shift", "use_dynamic_shifting", "time_shift_type",  # of use_flow_sigmas
    "skip_prk_steps", "solver_p", "predict_x0", "disable_corrector", "interpolation_type",
    "sigma_min", "sigma_max", "noise_sampler_seed",  # of other solvers
)  # fmt: skip
_KNOWN = {
    *_FIELDS, *(key for needs in _NEEDS.values() for key in needs), *_WITHOUT_EFFECT,
    "clip_sample", "clip_sample_range", "set_alpha_to_one", "timestep_spacing", "variance_type",
}  # fmt: skip


def scheduler_beside(weights: Path) -> Path | None:
    """The scheduler's file of the pipeline that this transformer's weight file belongs to. Warns if
    the pipeline's index names a scheduler whose file is missing, or is itself missing."""
    folder = weights.parent  # not the file's own target: the hub's cache links files to blobs
    for place in (folder.absolute(), folder.resolve()):
        path = place.parent / "scheduler" / CONFIG
        index = place.parent / "model_index.json"
        if place.name != "transformer" or not (index.is_file() or path.is_file()):
            continue
        if not index.is_file():
            told = f"{path} is taken for this model's, although there is no {index}"
            warnings.warn(told, stacklevel=2)
        elif not path.is_file():
            named = read_json(index).get("scheduler")
            if isinstance(named, list) and any(named):
                told = f"{index} names a scheduler, {named[-1]!r}, but there is no {path}"
                warnings.warn(f"{told}: the published diffusion is taken", stacklevel=2)
            return None
        return path
    return None


def read_diffusion(path: Path, config: ModelConfig) -> Diffusion:
    """The diffusion of a ``scheduler_config.json`` for the transformer of ``config``.

    A key that is unknown has no effect here or in diffusers; a warning names it. Raises ValueError,
    one line that names the file, the key and the value, and what is allowed.
    """
    values = read_json(path, lenient=True)  # lambda_min_clipped is -Infinity
    try:
        chosen, unknown = _fields(values, config)
        if unknown:
            told = one_line(", ".join(unknown))
            warnings.warn(f"{path}: unknown, without effect: {told}", stacklevel=2)
        return Diffusion(**chosen)
    except ValueError as error:
        message = str(error)
        for key, field in {**_FIELDS, "clip_sample_range": "clip"}.items():
            message = re.sub(rf"\b{field}\b", key, message)
        raise ValueError(f"{path}: {message}") from None


def _fields(values: dict[str, Any], config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """The fields of `Diffusion`, and the keys without effect."""
    kind = values.get("_class_name")
    if kind not in CLASSES:
        raise ValueError(
            f"_class_name {kind!r} is not of a diffusion that the samplers undo; known are "
            f"{', '.join(CLASSES)}"
        )
    sampler = _SAMPLERS.get(kind)
    unknown = [key for key in values if key not in _KNOWN and not key.startswith("_")]
    for key, allowed in (_NEEDS[""] | _NEEDS.get(kind, {})).items():
        _need(values, key, allowed)
    chosen: dict[str, Any] = {}
    if kind in _LATENT_BETAS:
        chosen = {"beta_start": 0.00085, "beta_end": 0.012}
    chosen |= {field: values[key] for key, field in _FIELDS.items() if key in values}
    if kind not in _CLIPPING and values.get("clip_sample"):
        unknown.append("clip_sample")
    elif kind in _CLIPPING and _flag(values, "clip_sample", default=sampler is not None):
        chosen["clip"] = values.get("clip_sample_range", 1.0)
        if chosen["clip"] is None:
            raise ValueError("clip None is not a finite number above 0")
    chosen["end_at_first"] = not _flag(values, "set_alpha_to_one", default=True)
    if sampler is not None:
        usual = "linspace" if sampler == "dpm++" else "leading"
        allowed = (usual, "leading", "linspace", "trailing")
        scheduler = f"{sampler} {_need(values, 'timestep_spacing', allowed)}"
        chosen["scheduler"] = scheduler if scheduler in OWN_SPACINGS else None
    if sampler == "ddpm":
        variance = _need(values, "variance_type", tuple(_VARIANCES))
        if variance == "learned_range" and not config.learn_sigma:
            raise ValueError("variance_type 'learned_range': the transformer learns no variance")
        ends_above_0 = values.get("timestep_spacing") == "trailing" or values.get("steps_offset")
        if variance == "fixed_large" and ends_above_0:
            raise ValueError(
                "variance_type 'fixed_large': DDPMScheduler adds noise at its last step unless "
                "that is step 0, as timestep_spacing 'leading' with steps_offset 0 has it; the "
                "ddpm here adds none"
            )
        chosen["variance"] = _VARIANCES[variance]
    return chosen, unknown


def _need(values: dict[str, Any], key: str, allowed: tuple[Any, ...]) -> Any:
    """The value of ``key``, by default the first of the allowed ones."""
    value = values.get(key, allowed[0])
    # 1 == True and 0 == False, but no flag is a number.
    if not any(type(value) is type(other) and value == other for other in allowed):
        shown = " or ".join(dict.fromkeys(repr(v) for v in allowed if v is not None))
        raise ValueError(f"{key} {value!r} is not what the samplers do: {shown} is")
    return value


def _flag(values: dict[str, Any], key: str, default: bool) -> bool:
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{key} {value!r} is neither true nor false")
    return value
