"""Whether a model runs with the settings that were asked for, found out before any long work."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_engine.engine import Engine


class _Ran(Exception):
    """A step was taken."""


def try_step(engine: Engine, count: int, **settings: Any) -> None:
    """Take one denoising step of ``count`` images, or raise what `Engine.generate` raises.

    The count should be that of the real batches, for which a backend may compile or allocate.
    """

    def stop(_: object) -> None:
        raise _Ran

    with suppress(_Ran):
        engine.generate([0] * count, callback=stop, output="latent", **settings)
