"""Sheets of samples of a trained model: eager float32, and the backend that is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_engine.engine import Engine
from dit_engine.results import make_sheet

if TYPE_CHECKING:
    from PIL import Image

REFERENCE = ("eager", "fp32")
_LARGE_PX = 128  # from there on fewer images are made, since eager float32 is slow


def sample_sheets(
    engine: Engine, subject: tuple[str, str], steps: int, sampler: str, callback: Any = None
) -> list[tuple[str, Image.Image]]:
    """A captioned sheet each, of the same labels and seeds; one if they are the same backend."""
    assert engine.image_size is not None
    count = min(4 if engine.image_size >= _LARGE_PX else 16, engine.config.num_classes)
    labels = list(range(count))
    names = engine.label_names
    captions = [names[label] if names else str(label) for label in labels]
    sheets = []
    for backend, precision in dict.fromkeys([REFERENCE, subject]):
        made = engine.generate(
            labels, steps=steps, sampler=sampler, seed=0, backend=backend, precision=precision,
            output="pil", callback=callback,
        )  # fmt: skip
        caption = f"{backend} {precision}, {steps} steps of {sampler}, seeds 0 to {count - 1}"
        sheets.append((caption, make_sheet(made.images, captions)))
    return sheets
