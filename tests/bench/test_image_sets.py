"""Image sets are read as they were written, in batches, and what is wrong is named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dit_bench.quality.image_sets import generated, open_set
from dit_bench.quality.metrics import frechet_distance, moments_of


def pixels(n: int, side: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3)).astype(np.uint8)


def statistics() -> dict[str, np.ndarray]:
    a = np.random.default_rng(1).normal(size=(50, 4))
    mean, covariance = a.mean(0), np.cov(a, rowvar=False)
    return {"mu": mean, "sigma": covariance, "mu_s": mean[:3], "sigma_s": covariance[:3, :3]}


def test_an_array_comes_back_in_batches(tmp_path: Path) -> None:
    images, path = pixels(11), tmp_path / "set.npz"
    np.savez_compressed(path, images)
    opened = open_set(path)
    assert (opened.count, opened.size, opened.statistics) == (11, (6, 6), None)
    batches = list(opened.batches(4))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(batches), images)


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    images = pixels(5)
    (tmp_path / "more").mkdir()
    for name, image in zip(
        ("1", "3", "2", "more/0"), (*images[:3], images[3, :, :, 0]), strict=True
    ):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    grey = np.repeat(images[3, :, :, :1], 3, axis=2)
    expected = [images[0], images[2], images[1], grey]
    np.testing.assert_array_equal(np.concatenate([*open_set(tmp_path).batches(3)]), expected)


def test_statistics_are_read_with_or_without_images(tmp_path: Path) -> None:
    stored = statistics()
    np.savez(tmp_path / "stats.npz", **stored)
    np.savez(tmp_path / "both.npz", pixels(3), **stored)
    for name, count in (("stats.npz", 0), ("both.npz", 3)):
        found = open_set(tmp_path / name)
        assert found.count == count and found.statistics is not None
        pooled, spatial = found.statistics
        assert pooled.count is None and (pooled.width, spatial.width) == (4, 3)
        np.testing.assert_allclose(pooled.mean, stored["mu"])
        np.testing.assert_allclose(spatial.covariance, stored["sigma_s"], rtol=1e-12)


def test_statistics_in_single_precision_are_taken(tmp_path: Path) -> None:
    """Rounding to float32 leaves eigenvalues below 0, which are none of the file's making."""
    rng = np.random.default_rng(9)
    exact = moments_of(rng.normal(size=(200, 3)) @ rng.normal(size=(3, 12)))  # rank 3
    mean, rounded = exact.mean.astype(np.float32), exact.covariance.astype(np.float32)
    assert np.linalg.eigvalsh(rounded.astype(np.float64))[0] < -1e-9
    np.savez(tmp_path / "a.npz", mu=mean, sigma=rounded, mu_s=mean[:2], sigma_s=np.diag([1.0, -1]))
    found = open_set(tmp_path / "a.npz").statistics
    assert found is not None
    pooled, wrong = found
    assert frechet_distance(pooled, exact) == pytest.approx(0, abs=1e-3)
    with pytest.raises(ValueError, match="eigenvalue -1"):
        frechet_distance(wrong, wrong)


def test_generated_images_take_labels_and_seeds_in_order() -> None:
    asked: list[tuple[list[int], list[int]]] = []

    class Engine:
        image_size = 6

        def generate(self, labels: list[int], *, seeds: list[int], **more: Any) -> Any:
            assert more == {"output": "np", "steps": 2}
            asked.append((labels, seeds))
            return SimpleNamespace(images=pixels(len(labels)), settings=more)

    engine: Any = Engine()
    images = generated(engine, "model", [0, 1, 2, 0, 1, 2, 0], 10, steps=2)
    assert [len(batch) for batch in images.batches(4)] == [4, 3]
    assert asked == [([0, 1, 2, 0], [10, 11, 12, 13]), ([1, 2, 0], [14, 15, 16])]
    assert (images.count, images.size, images.record["steps"]) == (7, (6, 6), 2)


FOLDERS = {
    "empty": ([], r"holds no images \(.png, .jpg"),
    "sizes": ([pixels(1)[0], pixels(1, 8)[0]], r"0.png is 6×6 pixels and .*1.png is 8×8 pixels"),
    "16 bits": ([np.zeros((6, 6), np.uint16)], r"0.png is not a readable image \(mode I;16; 8-bit"),
}
ARRAYS = {
    "names": ({"images": pixels(2)}, r"holds images; arr_0 \(images\), or all of mu, sigma, mu_s"),
    "floats": ({"arr_0": np.zeros((2, 6, 6, 3))}, r"arr_0 is float64 \(2, 6, 6, 3\); uint8 \(N"),
    "channels": ({"arr_0": np.zeros((2, 3, 6, 6), np.uint8)}, r"arr_0 is uint8 \(2, 3, 6, 6\)"),
    "none": ({"arr_0": np.zeros((0, 6, 6, 3), np.uint8)}, r"arr_0 is uint8 \(0, 6, 6, 3\)"),
    "order": ({"arr_0": np.asfortranarray(pixels(2))}, "Fortran order"),
    "a part": ({"mu": np.zeros(4)}, "holds mu; .*all of mu, sigma"),
    "width": (statistics() | {"mu": np.zeros(3)}, r"sigma is float64 \(4, 4\); floating"),
    "skew": (statistics() | {"sigma": np.triu(np.ones((4, 4)))}, "sigma is not symmetric"),
    "NaN": (statistics() | {"mu_s": np.full(3, np.nan)}, "mu_s .*NaN"),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*FOLDERS, *ARRAYS, "absent", "suffix", "archive", "damage"])
def test_bad_sets_are_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    message = {"absent": "does not exist", "suffix": "neither a folder", "archive": "damaged",
               "damage": r"set\.npz is damaged"}  # fmt: skip
    if kind in FOLDERS:
        images, message[kind] = FOLDERS[kind]
        path.mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(path / f"{i}.png")
    elif kind in ARRAYS:
        arrays, message[kind] = ARRAYS[kind]
        np.savez(path, **arrays)
    elif kind == "damage":
        np.savez_compressed(path, pixels(400))
        data = bytearray(path.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
        path.write_bytes(data)
    elif kind != "absent":
        path = path.with_suffix(".npy" if kind == "suffix" else ".npz")
        path.write_bytes(b"no archive")
    with pytest.raises((ValueError, FileNotFoundError), match=message[kind]) as caught:
        list(open_set(path).batches(4))
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
