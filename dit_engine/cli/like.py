"""Read options of dit-generate from the record in a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dit_engine.io.images import open_image
from dit_engine.io.provenance import is_source

_SHOWN = 200  # characters of a path in a message

_CELL_PIXELS = 64 * 64  # of the smallest image on a sheet
_NUMBERS = ("num_heads", "vae_scaling_factor", "vae_shift_factor", "vae_groups", "columns")
_SAME = (*_NUMBERS, "model", "vae", "numerics", "prediction", "sampler", "steps", "spacing", "eta",
         "guidance_channels", "guidance_interval", "noise", "precision", "backend")  # fmt: skip
_TOLD = ("version", "diffusion", "label", "labels", "label_name", "label_names", "seed", "seeds",
         "index", "guidance_scale")  # fmt: skip


def given_model(path: Path, recorded: str, given: str | None) -> str:
    """The model with which ``path`` is made again.

    A picture must not choose what is read from this machine or fetched from a hub. So the user must
    give every model except the built-in one; otherwise this raises a one-line ValueError.
    """
    if given is None and recorded != "builtin":
        raise ValueError(
            f"{path} was made with model {recorded[:_SHOWN]!r}: give it with --model, since a "
            "picture does not choose what is loaded"
        )
    return "builtin" if given is None else given


def given_vae(path: Path, recorded: str | None, given: str | None, another: bool) -> bool:
    """Whether the VAE is the one with which ``path`` was made.

    another: the model is not the one with which ``path`` was made. Raises a one-line ValueError if
    the user must give the VAE.
    """
    if given is not None:
        return recorded is not None and is_source(given, recorded)
    if recorded is not None and not another:
        raise ValueError(
            f"{path} was made with vae {recorded[:_SHOWN]!r}: give it with --vae, since a picture "
            "does not choose what is loaded"
        )
    return not another


def recorded_options(path: Path) -> dict[str, Any]:
    """Defaults for the parser that make the image or the sheet ``path`` again.

    Raises ValueError, one line with the path, for a file that does not tell them, or
    that tells what is unknown here.
    """
    from dit_engine.metadata import record_in

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
    for name in ("model", "vae", "numerics", "prediction", "sampler", "spacing", "noise",
                 "precision", "backend"):  # fmt: skip
        if not isinstance(record.get(name, ""), str):
            raise ValueError(f"{path}: {name} is no text")
    for name in _NUMBERS:
        if type(record.get(name, 0)) not in (int, float):
            raise ValueError(f"{path}: {name} is no number")
    if not isinstance(record.get("guidance_interval"), list | type(None)):
        raise ValueError(f"{path}: guidance_interval is no pair")
    if "://" in record.get("backend", ""):
        record["backend"] = "auto"  # no file says which server is asked
    options: dict[str, Any] = {"diffusion": record.get("diffusion", {})}
    options |= {name: record[name] for name in _SAME if name in record}
    scale, seed = record.get("guidance_scale"), record.get("seed")
    seeds = record.get("seeds", None if seed is None else [seed])
    options["guidance_scale"] = scale if isinstance(scale, list) else [scale]
    if record["noise"] == "official":
        options["seed"] = seeds[0] if isinstance(seeds, list) and seeds else None
    else:
        options["seeds"] = seeds
        # As --seed gave them: then they go on for more labels.
        numbers = isinstance(seeds, list) and all(type(seed) is int for seed in seeds)
        if numbers and seeds and seeds == [*range(seeds[0], seeds[0] + len(seeds))]:
            options["seed"] = options.pop("seeds")[0]
    options["labels"] = record.get("labels", [record.get("label")])
    if not isinstance(options["labels"], list) or not options["labels"]:
        raise ValueError(f"{path}: labels is not a list")
    many = len(options["labels"])
    if "label" not in record and many * _CELL_PIXELS > width * height:
        raise ValueError(f"{path}: no sheet of {width}×{height} pixels shows its {many} labels")
    only = None
    if "label" in record:
        index = record.get("index")
        only = index if "labels" in record else 0  # "labels": of an official batch
        if type(only) is not int or not 0 <= only < len(options["labels"]):
            raise ValueError(f"{path}: index is no place in its batch")
    return options | {"only": only}
