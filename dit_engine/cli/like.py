"""``dit-generate --like``: take the settings of an image or a sheet from its own record."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dit_engine.console.output import is_sheet
from dit_engine.io.images import open_image
from dit_engine.io.provenance import is_source

_SHOWN = 200  # characters of a path in a message
_CELL_PIXELS = 64 * 64  # of the smallest image on a sheet
_TEXTS = (
    "model", "vae", "numerics", "prediction", "sampler", "spacing", "noise", "precision", "backend",
)  # fmt: skip
_NUMBERS = ("num_heads", "vae_scaling_factor", "vae_shift_factor", "vae_groups", "columns")
# Recorded settings that are options of the same name, and settings that are read in another way.
_SAME = (*_TEXTS, *_NUMBERS, "steps", "eta", "guidance_channels", "guidance_interval")
_TOLD = ("version", "diffusion", "label", "labels", "label_name", "label_names", "seed", "seeds",
         "index", "guidance_scale")  # fmt: skip


def arguments_like(
    path: Path, argv: Sequence[str] | None, make_parser: Callable[[], argparse.ArgumentParser]
) -> argparse.Namespace:
    """The arguments of ``argv``, with what the image ``path`` records in place of the defaults.

    A picture must not choose what is read from this machine or fetched from a hub. So the user must
    name every model except the built-in one, and also the VAE if it was not the model's own.

    Raises a one-line ValueError if one of these is missing, and what `recorded_options` raises.
    """
    recorded, usual = recorded_options(path), vars(make_parser().parse_args([]))
    parser = make_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # then the result holds only what is given
    given = vars(parser.parse_args(argv))
    for name in ("diffusion", "only"):  # of no option
        del given[name]
    model, vae = recorded.pop("model"), recorded.pop("vae", None)
    another = "model" in given and not is_source(given["model"], model)
    for name, source, needed in (
        ("model", model, model != "builtin"),
        ("vae", vae, vae is not None and not another),
    ):
        if needed and name not in given:
            raise ValueError(
                f"{path} was made with {name} {source[:_SHOWN]!r}: give it with --{name}, since a "
                "picture does not choose what is loaded"
            )
    values = usual | recorded | given
    # Recorded settings of a model, a VAE, a sheet or a sampler do not apply to another one.
    unused: set[str] = set()
    if another:
        unused |= {"numerics", "num_heads", "prediction", "diffusion"}
    if another if "vae" not in given else vae is None or not is_source(given["vae"], vae):
        unused |= {"vae_scaling_factor", "vae_shift_factor", "vae_groups"}
    if values["prediction"] != recorded.get("prediction"):
        unused.add("diffusion")
    if not is_sheet(values["output"]):
        unused.add("columns")
    dropped = sorted(unused & recorded.keys())
    if another and any(recorded[name] for name in dropped):
        warnings.warn(
            f"{path} was made with another model, {model[:_SHOWN]!r}: these settings of it are not "
            f"used: {', '.join(dropped)}",
            stacklevel=2,
        )
    if values["sampler"] != recorded.get("sampler"):  # each sampler has its own usual values
        dropped += ["steps", "spacing", "eta"]
    values |= {name: usual[name] for name in dropped} | given
    if {"seed", "seeds"} & given.keys():
        values |= {name: given.get(name) for name in ("seed", "seeds")}
    if "all_labels" in given:
        values["labels"] = None
    count = len(values["labels"] or ()) * values["repeat"]
    if {"all_labels", "labels"} & given.keys() or values["repeat"] != 1:
        values["only"] = 0 if count == 1 else None
        seeds = None if "seeds" in given else values["seeds"]
        if isinstance(seeds, list) and len(seeds) != count:
            raise ValueError(
                f"--like {path} records {len(seeds)} seeds, which do not fit these labels: give "
                "--seed, or --seeds"
            )
    return argparse.Namespace(**values)


def recorded_options(path: Path) -> dict[str, Any]:
    """The recorded settings that make the image or the sheet ``path`` again, by option.

    Raises a one-line ValueError with the path for a file that does not hold them, or that holds
    settings which are unknown here.
    """
    from dit_engine.results import record_in

    with open_image(path) as image:
        record, (width, height) = record_in(image), image.size
    if record is None or not {"model", "noise"} <= record.keys():
        raise ValueError(f"{path} holds no settings of dit-generate")
    for name in record:
        if name.endswith("_sha256"):
            given = name.removesuffix("_sha256")
            raise ValueError(f"{path} was made from given {given}, which it does not hold")
        if name not in (*_SAME, *_TOLD):
            raise ValueError(f"{path} was made with {name[:80]!r}, which is unknown here")
    for names, types, usual, wanted in (
        (_TEXTS, (str,), "", "text"),
        (_NUMBERS, (int, float), 0, "number"),
        (("guidance_interval",), (list, type(None)), None, "pair"),
    ):
        for name in names:
            if type(record.get(name, usual)) not in types:
                raise ValueError(f"{path}: {name} is no {wanted}")
    if "://" in record.get("backend", ""):
        record["backend"] = "auto"  # a file must not choose a server
    options = {name: record[name] for name in _SAME if name in record}
    options["diffusion"] = record.get("diffusion", {})
    scale, seed = record.get("guidance_scale"), record.get("seed")
    options["guidance_scale"] = scale if isinstance(scale, list) else [scale]
    seeds = record.get("seeds", None if seed is None else [seed])
    listed = seeds if isinstance(seeds, list) else []
    numbers = bool(listed) and all(type(seed) is int for seed in listed)
    if record["noise"] == "official":
        options["seed"] = listed[0] if listed else None
    elif numbers and listed == [*range(listed[0], listed[0] + len(listed))]:
        options["seed"] = listed[0]  # as --seed gave them: then they go on for more labels
    else:
        options["seeds"] = seeds
    labels = record.get("labels", [record.get("label")])
    if not isinstance(labels, list) or not labels:
        raise ValueError(f"{path}: labels is not a list")
    only = None
    if "label" in record:
        only = record.get("index") if "labels" in record else 0  # "labels": of an official batch
        if type(only) is not int or not 0 <= only < len(labels):
            raise ValueError(f"{path}: index is no place in its batch")
    elif len(labels) * _CELL_PIXELS > width * height:
        raise ValueError(
            f"{path}: no sheet of {width}×{height} pixels shows its {len(labels)} labels"
        )
    return options | {"labels": labels, "only": only}
