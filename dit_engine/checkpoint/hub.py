"""From what a user names ("builtin", a path, a hub id) to a path on this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dit_engine.checkpoint.scheduler import CONFIG
from dit_engine.checkpoint.weights import SUFFIXES
from dit_engine.io.printable import first_line

BUILTIN = "builtin"
BUILTIN_DIRECTORY = Path(__file__).parents[1] / BUILTIN
# Hub ids: owner/name (huggingface_hub's own rule is stricter; it has the last word).
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The published sizes are no hub ids, though "DiT-XL/2" has the look of one.
PUBLISHED_SIZE = re.compile(r"(?:DiT-)?(?:S|B|L|XL)[/-][248]")
COMPONENTS = ("", "transformer/", "vae/")


def locate(source: str | Path, kind: str = "model") -> Path:
    """The file or directory that ``source`` names, downloaded where it is a hub id.

    Args:
        source: "builtin", a path, or a hub id such as "facebook/DiT-XL-2-256". What exists here
            is taken from here.
        kind: what messages call it.

    Raises:
        FileNotFoundError: nothing of this name is here, and it is no hub id.
        OSError: it is where one may not look, or its name is longer than names can be.
        ValueError: the hub does not have it, or is out of reach and the cache does not have it;
            or ``source`` is the name of a size, empty, neither a string nor a path, or under a
            home that is unknown.
    """
    if source == BUILTIN:
        if not BUILTIN_DIRECTORY.is_dir():
            raise FileNotFoundError(
                f"model 'builtin' is missing from this installation: {BUILTIN_DIRECTORY}"
            )
        return BUILTIN_DIRECTORY
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"{kind} {source!r} is neither a string nor a path")
    if not str(source):
        raise ValueError(f"{kind} '' is empty; give 'builtin', a path or a hub id owner/name")
    try:
        path = Path(source).expanduser()
    except RuntimeError:  # "~name" of nobody here
        raise ValueError(f"{kind} {str(source)!r}: the home directory is not known") from None
    if path.exists():
        return path
    if isinstance(source, str) and PUBLISHED_SIZE.fullmatch(source):
        raise ValueError(
            f"{kind} {source!r} is a size, for which there are no weights here; give 'builtin', a "
            "path such as DiT-XL-2-256x256.pt or a hub id such as facebook/DiT-XL-2-256"
        )
    if isinstance(source, str) and HUB_ID.fullmatch(source) and path.suffix not in SUFFIXES:
        return download(source)
    raise FileNotFoundError(
        f"{kind} {str(source)!r} does not exist; give 'builtin', a path or a hub id owner/name"
    )


def download(repo_id: str) -> Path:
    """A snapshot of the model's configs and weights, safetensors where the hub has them.

    Half-precision variants and other frameworks' files are left out. Files that are in the cache
    already are not fetched again; without a network the cache alone serves.
    """
    patterns = ["model_index.json", "labels.json", "model.safetensors", f"scheduler/{CONFIG}"]
    for prefix in COMPONENTS:
        patterns.append(f"{prefix}config.json")
        patterns += _patterns(prefix, "safetensors")
    path = _snapshot(repo_id, patterns)
    pickled = [
        pattern
        for prefix in COMPONENTS
        if (path / prefix / "config.json").exists()
        and not any((path / prefix).glob("*.safetensors"))
        for pattern in _patterns(prefix, "bin")
    ]
    return _snapshot(repo_id, pickled) if pickled else path


def _patterns(prefix: str, suffix: str) -> list[str]:
    stem = f"{prefix}diffusion_pytorch_model"
    return [f"{stem}.{suffix}", f"{stem}-?????-of-?????.{suffix}", f"{stem}.{suffix}.index.json"]


def _snapshot(repo_id: str, patterns: list[str]) -> Path:
    import huggingface_hub  # slow to import, and only needed here

    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=patterns))
    except MemoryError:
        raise
    except Exception as error:  # which library raises for HTTP depends on the hub's version
        raise ValueError(
            f"model {repo_id!r} is no path here, and the Hugging Face hub did not give it: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from None
