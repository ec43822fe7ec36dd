"""The built-in model makes recognisable images of its classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dit_engine import Engine
from dit_engine.training.avatars import CLASSES, HELD_OUT_SEED, render

ROOT = Path(__file__).resolve().parents[2]
BUILTIN = ROOT / "dit_engine" / "builtin"

EACH = 12
# Bounds of the sample below, each with what was measured on a Zen 4 CPU.
CLASSES_MOSTLY_RECOGNISED = 15  # of 16; 16, and "thumbs" with 7 of 12 images
RECOGNISED_OF_ALL = 0.87  # 0.93
DISTANCE_OVER_FLOOR = 2.8  # 119.1 / 46.9 = 2.5


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("builtin", check_finite=True, device="cpu")


def test_it_is_small_named_and_documented(engine: Engine) -> None:
    assert engine.label_names == CLASSES and len(CLASSES) >= 16
    assert engine.image_size == 64
    assert sum(p.stat().st_size for p in BUILTIN.rglob("*.safetensors")) < 25 * 2**20
    card = (BUILTIN / "README.md").read_text(encoding="utf-8")
    for word in ("CC0 1.0", "Apache-2.0", "FD-Lite0", "steps", "seeds", *CLASSES):
        assert word in card, word


def test_every_class_is_recognised_most_of_the_time_in_the_committed_report() -> None:
    path = ROOT / "benchmarks" / "results" / "builtin-quality.json"
    made = json.loads(path.read_text(encoding="utf-8"))["rows"]
    (made,) = (r for r in made if (r["section"], r["case"]) == ("recognised", "generated"))
    assert made["n"] >= 2400 and set(made["by_class"]) == set(CLASSES)
    assert min(made["by_class"].values()) > 0.5


@pytest.mark.slow
def test_generated_images_are_near_the_held_out_ones(engine: Engine) -> None:
    """FD-Lite0 and recognition, by class, of a small sample.

    A small N raises a Fréchet distance, so the bound is relative to the floor of the same N: held-
    out images of other seeds.
    """
    from dit_bench.quality.fd_lite0 import recognised
    from dit_bench.quality.features import load_network
    from dit_bench.quality.frechet import frechet_distance, moments_of

    labels = np.repeat(np.arange(len(CLASSES)), EACH)
    settings = {"steps": 20, "sampler": "dpm++", "guidance_scale": 2.0, "precision": "bf16"}
    made = engine.generate(labels.tolist(), seed=0, output="np", **settings).images
    network = load_network("lite0")

    def held_out(first: int) -> np.ndarray:
        seeds = range(HELD_OUT_SEED + first, HELD_OUT_SEED + first + EACH)
        return network.extract(np.concatenate([render(n, seeds, 64) for n in CLASSES])).pooled

    reference, other, features = held_out(0), held_out(EACH), network.extract(made).pooled
    hits = recognised(features, labels, reference, labels).reshape(len(CLASSES), EACH)
    by_class = dict(zip(CLASSES, hits.mean(axis=1), strict=True))
    distance, floor = (
        frechet_distance(moments_of(f), moments_of(reference), allow_few=True)
        for f in (features, other)
    )
    print(f"FD-Lite0 {distance:.1f}, floor {floor:.1f}, recognised {hits.mean():.3f}: {by_class}")
    assert sum(share >= 0.5 for share in by_class.values()) >= CLASSES_MOSTLY_RECOGNISED, by_class
    assert hits.mean() >= RECOGNISED_OF_ALL
    assert distance / floor <= DISTANCE_OVER_FLOOR
    # These bounds can fail: images of one class under another's label are not recognised.
    assert recognised(np.roll(features, EACH, axis=0), labels, reference, labels).mean() < 0.1
