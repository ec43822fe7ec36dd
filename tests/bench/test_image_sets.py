"""Image sets are read as they were written, in batches, and what is wrong is named."""

from __future__ import annotations

import tracemalloc
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dit_bench.quality.image_sets import GeneratedImages, open_set


def pixels(n: int, side: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3)).astype(np.uint8)


def statistics(d: int = 4, s: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(50, d)), rng.normal(size=(50, s))
    return {
        "mu": a.mean(0),
        "sigma": np.cov(a, rowvar=False),
        "mu_s": b.mean(0),
        "sigma_s": np.cov(b, rowvar=False),
    }


def write_folder(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:04d}.png")
    return folder


def read(path: Path, batch_size: int = 4) -> list[np.ndarray]:
    images = open_set(path).images
    assert images is not None
    return list(images.batches(batch_size))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_array_comes_back_in_batches(tmp_path: Path, save: object) -> None:
    images = pixels(11)
    path = tmp_path / "set.npz"
    save(path, images)
    batches = read(path)
    assert [len(batch) for batch in batches] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(batches), images)
    opened = open_set(path)
    assert len(opened.images) == 11 and opened.images.size == (6, 6) and opened.statistics is None


def test_a_large_array_takes_the_memory_of_a_batch(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez_compressed(path, np.zeros((2000, 64, 64, 3), np.uint8))  # 24.6 MB
    images = open_set(path).images
    tracemalloc.start()
    count = sum(len(batch) for batch in images.batches(8))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 2000 and peak < 3e6


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    images = pixels(5)
    folder = write_folder(tmp_path / "set", images)
    (folder / "more").mkdir()
    Image.fromarray(images[0, :, :, 0]).save(folder / "more" / "grey.png")
    (folder / "notes.txt").write_text("no image")
    batches = read(folder)
    assert [len(batch) for batch in batches] == [4, 2]
    grey = np.repeat(images[0, :, :, :1], 3, axis=2)
    np.testing.assert_array_equal(np.concatenate(batches), [*images, grey])


def test_statistics_are_read_with_or_without_images(tmp_path: Path) -> None:
    stored = statistics()
    np.savez(tmp_path / "stats.npz", **stored)
    np.savez(tmp_path / "both.npz", pixels(3), **stored)
    alone, both = open_set(tmp_path / "stats.npz"), open_set(tmp_path / "both.npz")
    assert alone.images is None and len(both.images) == 3
    for found in (alone, both):
        assert found.statistics is not None
        pooled, spatial = found.statistics
        assert pooled.count is None and (pooled.width, spatial.width) == (4, 3)
        np.testing.assert_allclose(pooled.mean, stored["mu"])
        np.testing.assert_allclose(spatial.covariance, stored["sigma_s"], rtol=1e-12)


def test_generated_images_take_labels_and_seeds_in_order() -> None:
    asked: list[tuple[list[int], list[int]]] = []

    class Engine:
        image_size = 6

        def generate(self, labels: list[int], *, seeds: list[int], **more: Any) -> Any:
            assert more == {"output": "np", "steps": 2}
            asked.append((labels, seeds))
            return SimpleNamespace(images=pixels(len(labels)), settings=more)

    engine: Any = Engine()
    images = GeneratedImages(engine, "model", [0, 1, 2, 0, 1, 2, 0], 10, steps=2)
    assert [len(batch) for batch in images.batches(4)] == [4, 3] and len(images) == 7
    assert asked == [([0, 1, 2, 0], [10, 11, 12, 13]), ([1, 2, 0], [14, 15, 16])]
    assert images.size == (6, 6) and images.record["steps"] == 2


def refused(path: Path, message: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "absent does not exist", FileNotFoundError)
    folder = tmp_path / "set"
    folder.mkdir()
    refused(folder, r"holds no images \(.png, .jpg")
    write_folder(folder, pixels(6))
    Image.fromarray(pixels(1, 8)[0]).save(folder / "odd.png")
    refused(folder, r"odd.png is 8×8 pixels and 0000.png is 6×6 pixels; all images")
    (folder / "odd.png").write_bytes(b"not an image")
    refused(folder, r"odd.png is not a readable image \(cannot identify image file\)")
    big = np.random.default_rng(0).integers(0, 2**16, (6, 6)).astype(np.uint16)
    Image.fromarray(big).save(folder / "odd.png")
    refused(folder, r"odd.png is not a readable image \(mode I;16; 8-bit")
    whole = (folder / "0003.png").read_bytes()
    (folder / "odd.png").write_bytes(whole[: len(whole) - 40])  # header whole, pixels not
    refused(folder, r"odd.png is damaged")
    # A header of 60000 × 60000 pixels, which Pillow takes for a bomb.
    header = bytearray(whole[:33])
    header[16:24] = (60000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (folder / "odd.png").write_bytes(bytes(header) + whole[33:])
    refused(folder, r"odd.png is not a readable image \(Image size \(3600000000 pixels\)")


def test_arrays_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"

    def saved(message: str, *arrays: np.ndarray, **named: np.ndarray) -> None:
        np.savez(path, *arrays, **named)
        refused(path, message)

    saved(r"holds images; arr_0 \(images\) or mu, sigma, mu_s, sigma_s", images=pixels(2))
    saved(r"arr_0 is float64 \(2, 6, 6, 3\); uint8 \(N, H, W, 3\)", np.zeros((2, 6, 6, 3)))
    saved(r"arr_0 is uint8 \(2, 3, 6, 6\)", np.zeros((2, 3, 6, 6), np.uint8))
    saved(r"arr_0 is uint8 \(0, 6, 6, 3\)", np.zeros((0, 6, 6, 3), np.uint8))
    saved("Fortran order", np.asfortranarray(pixels(2)))
    stored = statistics()
    saved(r"holds mu; a statistics file also has sigma, mu_s, sigma_s", mu=stored["mu"])
    saved(r"mean \(3,\) and covariance \(4, 4\)", **stored | {"mu": np.zeros(3)})
    skew = stored["sigma"] + np.triu(np.ones((4, 4)), 1)
    saved("covariance is not symmetric", **stored | {"sigma": skew})
    saved("mean .*finite", **stored | {"mu": np.full(4, np.nan)})
    np.savez(path, pixels(200))
    path.write_bytes(path.read_bytes()[:9000])
    refused(path, "damaged or not an .npz")
    path.write_bytes(b"no archive")
    refused(path, "damaged or not an .npz")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0", b"without .npy")
    refused(path, "damaged or not an .npz")
    other = tmp_path / "set.npy"
    np.save(other, pixels(2))
    refused(other, "neither a folder of images nor an .npz")


def test_a_damaged_member_is_named(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez_compressed(path, pixels(400))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    path.write_bytes(data)
    refused(path, "set.npz is damaged")
