"""An engine that is copied, pickled, sent to another process or forked makes the same images."""

from __future__ import annotations

import copy
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path

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
def test_a_copy_makes_the_same_images(copied: Callable[[Engine], Engine], tmp_path: Path) -> None:
    """With weights that are mapped from their file."""
    save_pretrained(tmp_path / "m", tiny_dit(), tiny_vae(), NAMES)
    engine = Engine.from_pretrained(tmp_path / "m", device="cpu", max_batch_size=2, threads=1)
    expected = engine.generate(["cat", 7, 1], **OPTIONS)
    twin = copied(engine)
    result = twin.generate(["cat", 7, 1], **OPTIONS)
    assert np.array_equal(result.images, expected.images)
    assert result.settings == expected.settings and repr(twin) == repr(engine)
    for name in ("max_batch_size", "threads", "label_names", "config"):
        assert getattr(twin, name) == getattr(engine, name)
    assert (twin.model is engine.model) is (copied is copy.copy)
    assert twin._lock is not engine._lock and twin._backends is not engine._backends


def test_an_engine_without_a_vae_is_copied() -> None:
    twin = pickled(tiny_engine(vae=False))
    assert twin.vae is None and twin.generate(1, steps=1, seed=0).images.shape == (1, 4, 8, 8)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore")  # of forks beside threads
def test_a_forked_child_generates_on_one_thread() -> None:
    """Its parent has run OpenMP's threads, for which the child would wait for ever."""
    engine, before = tiny_engine(vae=False, threads=2), torch.get_num_threads()

    def made() -> list[torch.Tensor]:
        backends = ("lean", "eager")
        return [engine.generate([1, 2], steps=2, seed=0, backend=b).images for b in backends]

    try:
        torch.set_num_threads(2)
        torch.zeros(1 << 20).exp()
        expected = made()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(20)
                same = all(map(torch.equal, made(), expected))
                torch.zeros(1 << 20).exp()
                code = 0 if same and torch.get_num_threads() == 1 else 1
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)
