"""The avatar data set: deterministic, split by seed, CC0 only."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest

from dit_engine.training import avatars


def test_images_are_a_function_of_style_and_seed() -> None:
    first = avatars.render("planets", range(3), 32)
    assert first.shape == (3, 32, 32, 3) and first.dtype == np.uint8
    assert np.array_equal(first[1:], avatars.render("planets", range(1, 3), 32))
    assert not np.array_equal(first[0], first[1])
    assert first.std() > 20  # a picture, not a blank


@pytest.mark.slow
def test_splits_share_no_seed_and_are_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(avatars, "CLASSES", ("shadows", "stack"))
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # one process
    train = avatars.load_avatars(tmp_path, "train", 3, 16)
    monkeypatch.setattr(avatars, "ProcessPoolExecutor", lambda **_: ThreadPoolExecutor(1))
    held_out = avatars.load_avatars(tmp_path, "held-out", 3, 16)
    assert train.labels.tolist() == held_out.labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = [avatars.render(name, range(3), 16) for name in ("shadows", "stack")]
    assert np.array_equal(train.images, np.concatenate(expected))
    first = avatars.HELD_OUT_SEED
    expected = avatars.render("shadows", range(first, first + 3), 16)
    assert np.array_equal(held_out.images[:3], expected)
    monkeypatch.setattr(avatars, "render", None)  # read, not rendered, the second time
    again = avatars.load_avatars(tmp_path, "train", 3, 16)
    assert np.array_equal(again.images, train.images)
    with pytest.raises(ValueError, match="reaches the held-out seeds"):
        avatars.load_avatars(tmp_path, "train", first + 1)
    with pytest.raises(ValueError, match="split 'test': choose 'train' or 'held-out'"):
        avatars.load_avatars(tmp_path, "test", 1)


def test_only_cc0_styles_are_used() -> None:
    with pytest.raises(ValueError, match=r"only 'CC0 1\.0' is used"):
        avatars.render("adventurer", range(1), 16)
    for name in avatars.CLASSES:
        style = json.loads(files("dicebear_styles").joinpath(f"{name}.json").read_bytes())
        assert style["meta"]["license"]["name"] == "CC0 1.0", name


def test_ctrl_c_does_not_wait_for_what_is_being_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that would take a minute for each part are ended."""

    class Interrupting(avatars.Bar):
        def __iter__(self) -> Iterator[object]:
            self.close()
            raise KeyboardInterrupt

    monkeypatch.setattr(avatars, "Bar", Interrupting)
    monkeypatch.setattr(avatars, "render", slowly)
    before = set(active_children())
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        avatars._render_all(0, 1, 16, "")
    assert time.monotonic() - start < 20 and set(active_children()) <= before


def slowly(*_: object) -> None:
    time.sleep(60)
