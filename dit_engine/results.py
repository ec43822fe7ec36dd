"""What `Engine.generate` gives: the images, and word of every step on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
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
