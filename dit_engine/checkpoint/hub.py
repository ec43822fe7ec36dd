"""Find a model: from what a user names ("builtin", a path, a hub id) to its files here."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dit_engine.checkpoint.convert import DIFFUSERS_CLASSES
from dit_engine.checkpoint.save import NATIVE_CLASS
from dit_engine.checkpoint.scheduler import CONFIG
from dit_engine.checkpoint.weights import SUFFIXES
from dit_engine.io.json_files import read_json, read_json_value
from dit_engine.io.printable import first_line, one_line, some_of

BUILTIN = "builtin"
BUILTIN_DIRECTORY = Path(__file__).parents[1] / BUILTIN
# A hub id is owner/name. (huggingface_hub's own rule is stricter and has the last word.)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The published sizes are not hub ids, though "DiT-XL/2" looks like one.
PUBLISHED_SIZE = re.compile(r"(?:DiT-)?(?:S|B|L|XL)[/-][248]")
COMPONENTS = ("", "transformer/", "vae/")
# A directory's weights in the order of preference; the names are diffusers' and transformers'.
WEIGHT_NAMES = tuple(
    f"{stem}{ending}"
    for ending in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
    for stem in ("model", "diffusion_pytorch_model")
)


def locate(source: str | Path, kind: str = "model") -> Path:
    """The file or directory that ``source`` names; a hub id is downloaded.

    Args:
        source: "builtin", a path, or a hub id such as "facebook/DiT-XL-2-256". A path that exists
            is preferred to a hub id.
        kind: what messages call it.

    Raises:
        FileNotFoundError: nothing here has this name, and it is not a hub id.
        OSError: the path may not be read, or is too long.
        ValueError: the hub does not give it, or ``source`` cannot be a name of a model.
    """
    if source == BUILTIN:
        if not BUILTIN_DIRECTORY.is_dir():
            raise FileNotFoundError(
                f"model 'builtin' is missing from this installation: {BUILTIN_DIRECTORY}"
            )
        return BUILTIN_DIRECTORY
    allowed = "give 'builtin', a path or a hub id owner/name"
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise ValueError(f"{kind} {source!r} names nothing; {allowed}")
    try:
        path = Path(source).expanduser()
    except RuntimeError:  # "~name", and no user has this name
        raise ValueError(f"{kind} {str(source)!r}: the home directory is not known") from None
    if path.exists():
        return path
    if isinstance(source, str) and PUBLISHED_SIZE.fullmatch(source):
        raise ValueError(
            f"{kind} {source!r} is a size, for which there are no weights here; give 'builtin', a "
            "path such as DiT-XL-2-256x256.pt or a hub id such as facebook/DiT-XL-2-256"
        )
    if isinstance(source, str) and HUB_ID.fullmatch(source) and path.suffix not in SUFFIXES:
        return _download(source)
    raise FileNotFoundError(f"{kind} {str(source)!r} does not exist; {allowed}")


def _download(repo_id: str) -> Path:
    """The directory with a model's configs and weights; safetensors are preferred to pickles.
    Half-precision variants are left out. Without a network only the hub's cache is used."""
    import huggingface_hub  # slow to import, and only needed here

    def snapshot(patterns: list[str]) -> Path:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=patterns))

    def weights(prefix: str, suffix: str) -> list[str]:
        stem = f"{prefix}diffusion_pytorch_model"
        return [f"{stem}{part}" for part in (f".{suffix}", f"-?????-of-?????.{suffix}",
                                             f".{suffix}.index.json")]  # fmt: skip

    patterns = ["model_index.json", "labels.json", "model.safetensors", f"scheduler/{CONFIG}"]
    for prefix in COMPONENTS:
        patterns += [f"{prefix}config.json", *weights(prefix, "safetensors")]
    try:
        path = snapshot(patterns)
        pickled = [
            pattern
            for prefix in COMPONENTS
            if (path / prefix / "config.json").exists()
            and not any((path / prefix).glob("*.safetensors"))
            for pattern in weights(prefix, "bin")
        ]
        return snapshot(pickled) if pickled else path
    except MemoryError:
        raise
    except Exception as error:  # the library that raises depends on the version of the hub's
        raise ValueError(
            f"model {repo_id!r} is no path here, and the Hugging Face hub did not give it: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from None


def open_directory(path: Path) -> tuple[Path, Path | None, tuple[str, ...] | None]:
    """(weight file, VAE directory, label names) of a native directory, of a diffusers pipeline or
    of a diffusers transformer."""
    vae = path / "vae" if (path / "vae").is_dir() else None
    index, config, labels = (path / f"{n}.json" for n in ("model_index", "config", "labels"))
    if index.is_file():
        values = read_json(index)
        if not (path / "transformer").is_dir():
            name = one_line(values.get("_class_name"))
            raise ValueError(f"{path}: a {name} without transformer/; a DiTPipeline is needed")
        names = None
        if ids := values.get("id2label"):  # {"0": "tench, Tinca tinca", …}
            try:
                names = tuple(str(ids[str(i)]) for i in range(len(ids)))
            except (KeyError, TypeError, IndexError):
                raise ValueError(f"{index}: id2label does not name the classes 0, 1, …") from None
        return find_weights(path / "transformer"), vae, names
    if not config.is_file():
        raise ValueError(
            f"{path}: no model directory; it needs config.json or model_index.json, "
            f"it holds {listing(path)}"
        )
    kind = read_json(config, lenient=True).get("_class_name")
    if kind not in (known := (NATIVE_CLASS, *DIFFUSERS_CLASSES)):
        raise ValueError(f"{path}: config.json is of class {kind!r}; known are {', '.join(known)}")
    if not labels.is_file():
        return find_weights(path), vae, None
    names = read_json_value(labels)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{labels}: not a list of names")
    return find_weights(path), vae, tuple(names)


def find_weights(directory: Path) -> Path:
    """The weights file in ``directory``. Raises ValueError if there is none, with a file list."""
    for name in WEIGHT_NAMES:
        if (directory / name).is_file():
            return directory / name
    raise ValueError(
        f"{directory}: holds no weights; {' or '.join(WEIGHT_NAMES[:2])} is needed, "
        f"it holds {listing(directory)}"
    )


def listing(directory: Path) -> str:
    """Some of the file names in ``directory``, for an error message."""
    return some_of(sorted(p.name for p in directory.iterdir() if not p.name.startswith(".")))
