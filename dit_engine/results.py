"""What `Engine.generate` gives: the images, and word of every step on the way."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True, repr=False)
class Progress:
    """What a callback is told after every step.

    step counts from 1 to steps; first and count say which images of the call this batch holds, of
    total in all; latents (count, C, S, S) is the sampler's state, not to be changed in place.
    """

    step: int
    steps: int
    first: int
    count: int
    total: int
    latents: Tensor

    def __repr__(self) -> str:
        return (
            f"Progress(step={self.step}, steps={self.steps}, first={self.first}, "
            f"count={self.count}, total={self.total}, latents={_outline(self.latents)})"
        )


@dataclass(frozen=True, repr=False)
class Generation:
    """The outcome of `Engine.generate`.

    images: a list of PIL images, uint8 (N, H, W, 3) for "np", float32 (N, 3, H, W) in [0, 1] for
    "pt", or float32 latents (N, C, S, S) for "latent"; tensors are on the CPU. None: only planned.
    labels and seeds hold one number an image; seeds is None where none was used, all noise having
    been given. settings: everything else that is needed to make the images again. label_names: the
    names of labels, where the model has names.
    """

    images: Any
    labels: list[int]
    seeds: list[int] | None
    settings: dict[str, Any] = field(default_factory=dict)
    label_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def save(self, path: str | Path) -> None:
        """Write PIL images with all that is needed to make them again.

        A .png gets the image, or a captioned sheet of several; any other name is a directory, in
        which each image becomes a PNG under the name that dit-generate would give it. Warns of
        files that it replaces.

        Raises ValueError for other outputs than "pil" and for names of other files, OSError for a
        path that cannot be written.
        """
        from dit_engine.cli.pictures import save
        from dit_engine.console.output import STDOUT, check_destination, file_name
        from dit_engine.io.files import atomic_path

        path = Path(path)
        if not isinstance(self.images, list):
            raise ValueError(f"{path}: PNGs are of output 'pil', not of {_outline(self.images)}")
        if path == STDOUT:
            raise ValueError(f"{path} is no name: give a .png or a directory")
        check_destination(path, suffixes=(".png",))
        whole = path.suffix.lower() == ".png"
        if whole and len(self) > 1:
            return save(self, path)
        if not whole:
            path.mkdir(parents=True, exist_ok=True)
        names, seeds = self.label_names or [None] * len(self), self.seeds or [None] * len(self)
        each = enumerate(zip(self.labels, names, seeds, strict=True))
        targets = [path] if whole else [path / file_name(i, *image) for i, image in each]
        if not whole and (n := sum(target.exists() for target in targets)):
            warnings.warn(f"{path} holds {n} of these images, which will be replaced", stacklevel=2)
        for target, image in zip(targets, self.images, strict=True):
            with atomic_path(target) as partial:
                image.save(partial, "PNG")
        return None

    def __repr__(self) -> str:
        return (
            f"Generation(images={_outline(self.images)}, labels={self.labels}, "
            f"seeds={self.seeds}, settings={self.settings}, label_names={self.label_names})"
        )


def _outline(images: Any) -> str:
    """Kind and shape of a tensor, an array, or a list of PIL images of one size."""
    if images is None:
        return "None"
    if isinstance(images, list):
        width, height = images[0].size
        return f"[{len(images)} PIL of {width}x{height}]"
    return f"<{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}>"
