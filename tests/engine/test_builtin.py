"""The built-in model makes recognisable images of its classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dit_engine import Engine
from dit_engine.training.avatars import CLASSES, HELD_OUT_SEED, render

BUILTIN = Path(__file__).resolve().parents[2] / "dit_engine" / "builtin"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("builtin", check_finite=True, device="cpu")


def test_it_is_small_and_named(engine: Engine) -> None:
    assert engine.label_names == CLASSES and len(CLASSES) >= 16
    assert engine.image_size == 64
    assert sum(p.stat().st_size for p in BUILTIN.rglob("*.safetensors")) < 25 * 2**20


@pytest.mark.slow
def test_generated_images_are_recognised_by_held_out_ones(engine: Engine) -> None:
    """A small sample, by its averages over 4×4 pixels: the report measures FD-Lite0."""
    from dit_bench.quality.fd_lite0 import recognised

    def of(images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        return torch.nn.functional.avg_pool2d(pixels, 4).flatten(1).numpy()

    each = 4
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + 2 * each)
    reference = of(np.concatenate([render(name, seeds, 64) for name in CLASSES]))
    known = np.repeat(np.arange(len(CLASSES)), 2 * each)
    labels = np.repeat(np.arange(len(CLASSES)), each)
    settings = {"steps": 8, "sampler": "dpm++", "guidance_scale": 2.0, "precision": "bf16"}
    made = of(engine.generate(labels.tolist(), seed=0, output="np", **settings).images)
    by_class = recognised(made, labels, reference, known).reshape(-1, each).mean(axis=1)
    told = dict(zip(CLASSES, by_class, strict=True))
    print(told)
    assert sum(by_class >= 0.5) >= 15, told
    assert by_class.mean() >= 0.87
    # These bounds can fail: images of one class under another's label are not recognised.
    assert recognised(np.roll(made, each, axis=0), labels, reference, known).mean() < 0.15
