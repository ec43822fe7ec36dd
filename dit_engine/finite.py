"""NaN and infinity in latents and pixels: looked for once, at the end; the error says where they
began."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from dit_engine.errors import NotFinite
from dit_engine.sampling.coefficients import LARGEST

_SHOWN = 4
_HELP = (
    "what helps is precision 'bf16' or 'fp32', a smaller guidance_scale, or other weights "
    "(check_finite=True looks for NaN in them)"
)

Sample = Callable[[Callable[[int, Tensor], None]], Tensor]
"""A sampling loop; it takes a function that it calls with every step and its latents."""


def all_finite(images: Tensor) -> bool:
    """Whether every value is below `LARGEST`, which NaN is not."""
    return bool((images.abs() < LARGEST).all())


def check_pixels(images: Tensor, names: Sequence[str] | None = None) -> None:
    """Raise `NotFinite` for NaN or infinity in decoded images (N, 3, H, W).

    names: what to call each image; None is by number.
    """
    if not all_finite(images):
        raise NotFinite(f"{_which(images, names)} not finite after the VAE's decoding: {_HELP}")


def check_latents(z: Tensor, again: Sample, steps: int, names: Sequence[str]) -> None:
    """Raise `NotFinite` for NaN or infinity in the final latents z (N, C, S, S) of so many steps.

    Only then is the first such step looked for, by sampling ``again``.
    """
    if all_finite(z):
        return
    step = _first_step(again)
    where = "at the end" if step is None else f"from step {step} of {steps} on"
    raise NotFinite(f"{_which(z, names)} not finite {where}: {_HELP}")


class _Found(Exception):
    """Ends the sampling at a step."""


def _first_step(sample: Sample) -> int | None:
    def look(step: int, z: Tensor) -> None:
        if not all_finite(z):
            raise _Found(step + 1)

    try:
        sample(look)
    except _Found as found:
        return found.args[0]
    return None


def _which(images: Tensor, names: Sequence[str] | None) -> str:
    """The images that are not finite, as the subject of a sentence."""
    bad = [i for i, finite in enumerate(map(all_finite, images)) if not finite]
    told = [f"image {i}" if names is None else names[i] for i in bad[:_SHOWN]]
    more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    return f"{', '.join(told)}{more} {'is' if len(bad) == 1 else 'are'}"
