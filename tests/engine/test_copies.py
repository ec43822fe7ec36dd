"""An engine that is copied, pickled or sent to another process makes the same images there."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import NAMES, tiny_dit, tiny_engine, tiny_vae

from dit_engine import Engine
from dit_engine.checkpoint import save_pretrained

OPTIONS = {"steps": 2, "seed": 3, "output": "np"}


def pickled(engine: Engine) -> Engine:
    return pickle.loads(pickle.dumps(engine))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
@pytest.mark.parametrize("backend", ["eager", "lean"])
def test_a_copy_makes_the_same_images(
    copied: Callable[[Engine], Engine], backend: str, tmp_path: Path
) -> None:
    save_pretrained(tmp_path / "m", tiny_dit(), tiny_vae(), NAMES)
    engine = Engine.from_pretrained(tmp_path / "m", device="cpu", max_batch_size=2, threads=1)
    expected = engine.generate(["cat", 7, 1], backend=backend, **OPTIONS)
    twin = copied(engine)
    result = twin.generate(["cat", 7, 1], backend=backend, **OPTIONS)
    assert np.array_equal(result.images, expected.images)
    assert result.settings == expected.settings
    assert repr(twin) == repr(engine)
    for name in ("device", "max_batch_size", "threads", "label_names", "sources", "config"):
        assert getattr(twin, name) == getattr(engine, name)
    assert (twin.model is engine.model) is (copied is copy.copy)
    assert twin._lock is not engine._lock and twin._backends is not engine._backends
    again = engine.generate(["cat", 7, 1], backend=backend, **OPTIONS)
    assert np.array_equal(again.images, expected.images)


def test_an_engine_without_a_vae_is_copied() -> None:
    twin = pickled(tiny_engine(vae=False))
    assert twin.vae is None and twin.generate(1, steps=1, seed=0).images.shape == (1, 4, 8, 8)


def _generate(engine: Engine, results: Queue[Any]) -> None:
    results.put(engine.generate([3, 8], **OPTIONS).images)


def test_a_spawned_process_takes_an_engine(tmp_path: Path) -> None:
    """With weights that are mapped from their file."""
    save_pretrained(tmp_path / "m", tiny_dit(), tiny_vae(), NAMES)
    engine = Engine.from_pretrained(tmp_path / "m", device="cpu")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_generate, args=(engine, results))
    process.start()
    try:
        images = results.get(timeout=120)
    finally:
        process.join(10)
        process.kill()
    assert process.exitcode == 0
    assert np.array_equal(images, engine.generate([3, 8], **OPTIONS).images)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_made_in_inference_mode_can_be_trained(
    copied: Callable[[Engine], Engine],
) -> None:
    engine = tiny_engine()
    with torch.inference_mode():
        twin = copied(engine)
    for original, module in ((engine.model, twin.model), (engine.vae, twin.vae)):
        assert original is not None and module is not None
        assert not any(tensor.is_inference() for tensor in module.state_dict().values())
        for one, other in zip(original.parameters(), module.parameters(), strict=True):
            assert torch.equal(one, other) and one.requires_grad == other.requires_grad
            other.data.add_(1)
    sum(p.square().sum() for p in twin.model.blocks.parameters()).backward()
