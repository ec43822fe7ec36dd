"""The avatar data set: pictures in DiceBear styles under CC0, rendered from seeds.

Each style is a class. Rendering is deterministic, so the data set needs no download. The two splits
share no seed: training takes 0, 1, 2, … and held-out images HELD_OUT_SEED, HELD_OUT_SEED + 1, …
"""

from __future__ import annotations

import signal
from concurrent.futures import ProcessPoolExecutor
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from dit_engine.console.bars import Bar
from dit_engine.current_directory import left_out_of_children
from dit_engine.io.arrays import map_npy
from dit_engine.io.files import atomic_path
from dit_engine.io.images import open_image
from dit_engine.io.json_files import check_schema, parse_json
from dit_engine.training.data import ImageSet

CLASSES = (
    "clay", "critters", "cutouts", "landscape", "marbles", "moods", "open-peeps", "pixel-art",
    "planets", "shadows", "slice", "sprouts", "stack", "thumbs", "voxel-bot", "waves",
)  # fmt: skip
HELD_OUT_SEED = 1_000_000
LICENCE = "CC0 1.0"
_CHUNK = 100
_STYLE = {"": {"meta": "object"}, "meta": {"license": "object"}, "meta.license": {"name": "text"}}


def load_avatars(cache: Path, split: str, per_class: int, size: int = 64) -> ImageSet:
    """Render ``per_class`` images of every class, or read them from the directory ``cache``.

    split: "train" or "held-out". size: pixels along a side.
    """
    first = {"train": 0, "held-out": HELD_OUT_SEED}.get(split)
    if first is None:
        raise ValueError(f"split {split!r}: choose 'train' or 'held-out'")
    if split == "train" and per_class > HELD_OUT_SEED:
        raise ValueError(f"per_class {per_class} reaches the held-out seeds at {HELD_OUT_SEED}")
    path = cache / f"avatars-{split}-{size}px-{per_class}.npy"
    labels = np.repeat(np.arange(len(CLASSES)), per_class)
    if not path.exists():
        images = _render_all(first, per_class, size, f"rendering {split} avatars")
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial, partial.open("wb") as file:
            np.save(file, images)
    images, shape = map_npy(path), (len(labels), size, size, 3)
    if images.dtype != np.uint8 or images.shape != shape:
        raise ValueError(
            f"{path} is {images.dtype} {images.shape}; uint8 {shape} is needed: remove it"
        )
    return ImageSet(images, labels, CLASSES)


def _render_all(first: int, per_class: int, size: int, description: str) -> np.ndarray:
    jobs = [
        (name, range(first + start, first + min(start + _CHUNK, per_class)), size)
        for name in CLASSES
        for start in range(0, per_class, _CHUNK)
    ]
    # Spawned, not forked: torch's threads do not survive a fork. A terminal sends Ctrl-C to all
    # processes, but only the parent answers it.
    ignored = (signal.SIGINT, signal.SIG_IGN)
    spawn = get_context("spawn")
    pool = ProcessPoolExecutor(mp_context=spawn, initializer=signal.signal, initargs=ignored)
    try:
        with left_out_of_children():
            parts = list(Bar(pool.map(render, *zip(*jobs, strict=True)), description, len(jobs)))
    except BaseException:
        for process in list((pool._processes or {}).values()):  # their images are not needed
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return np.concatenate(parts)


def render(style_name: str, seeds: range, size: int) -> np.ndarray:
    """Images of one style on white, uint8 (len(seeds), size, size, 3).

    Raises ImportError without the extra ``train``, ValueError for a style that is not CC0.
    """
    try:
        import resvg_py
        from dicebear import Avatar, Style
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'dit-engine[train]'") from error

    text = files("dicebear_styles").joinpath(f"{style_name}.json").read_bytes()
    definition = parse_json(text, f"style {style_name!r}")
    check_schema(definition, _STYLE, f"style {style_name!r}")
    licence = definition["meta"]["license"]["name"]
    if licence != LICENCE:
        raise ValueError(f"style {style_name!r} has licence {licence!r}; only {LICENCE!r} is used")
    style = Style(definition)
    images = np.empty((len(seeds), size, size, 3), np.uint8)
    for i, seed in enumerate(seeds):
        svg = Avatar(style, {"seed": str(seed), "size": size}).to_string()
        png = resvg_py.svg_to_bytes(
            svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True
        )
        with open_image(Path(f"{style_name}-{seed}.png"), bytes(png)) as image:
            images[i] = np.asarray(image.convert("RGB"))
    return images
