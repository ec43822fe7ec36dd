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
from dit_bench.quality.fd_lite0 import Halves, compare, load_halves, recognised
from dit_bench.quality.features import Extracted, FeatureNetwork
from dit_bench.report import validate
from dit_engine import engine as engine_module
from dit_engine.training import avatars
from dit_engine.training.data import ImageSet
from dit_engine.vae import AutoencoderKL, VAEConfig

COUNT = len(avatars.CLASSES)


def corner(images: np.ndarray) -> Extracted:
    return Extracted(images[:, :2, :2].reshape(len(images), -1)[:, :8].astype(np.float32))


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> FeatureNetwork:
    made = FeatureNetwork("lite0", "FD-Lite0", 8, corner)
    monkeypatch.setattr(quality, "FEATURES", 8)
    monkeypatch.setattr(quality, "load_network", lambda _: made)
    return made


def pictures(seed: int, count: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), np.uint8)


def blobs(seed: int, per_class: int = 700) -> tuple[np.ndarray, np.ndarray]:
    """Unit Gaussians of three classes; class c lies around 4·e_c."""
    labels = np.repeat(np.arange(3), per_class)
    features = np.random.default_rng(seed).normal(size=(len(labels), 6)).astype(np.float32)
    features[np.arange(len(labels)), labels] += 4
    return features, labels


def test_recognition_of_two_close_classes_is_bayes() -> None:
    """Means 2σ apart: the nearest mean is right with probability Φ(1) = 0.8413."""
    rng, labels = np.random.default_rng(4), np.repeat([0, 1], 20000)

    def two_blobs() -> np.ndarray:
        loud, constant = 1000 * rng.normal(size=(40000, 1)), np.full((40000, 1), 7.0)
        told = rng.normal(size=(40000, 1)) + 2.0 * labels[:, None]
        return np.concatenate([told, loud, constant], axis=1).astype(np.float32)

    hits = recognised(two_blobs(), labels, two_blobs(), labels)
    assert hits.mean() == pytest.approx(0.8413, abs=0.006)


def test_compare_ranks_and_counts() -> None:
    (a, labels), (b, _) = blobs(10), blobs(11)
    halves = Halves(np.zeros((len(a), 2, 2, 3), np.uint8), a, b, labels, ("x", "y", "z"))
    blurred, absent = a + 1.0, a.copy()
    absent[labels == 2] = absent[labels == 1]  # class z is never made
    found = {(row["section"], row["case"]): row for row in compare(halves, blurred, absent)}
    distances = {case: row["distance"] for (kind, case), row in found.items() if kind == "distance"}
    assert distances["floor"] < 0.1 and distances["generated"] > 1
    assert distances["vae_reconstruction"] == pytest.approx(6, rel=0.1)  # six features, each by 1
    assert {row["n"] for row in found.values()} == {2100}
    generated = found["recognised", "generated"]
    assert generated["by_class"]["z"] < 0.02 and generated["by_class"]["x"] > 0.98
    assert generated["fraction"] == pytest.approx(2 / 3, abs=0.02)
    assert found["recognised", "held_out"]["fraction"] > 0.98


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
    assert made.dtype == np.uint8 and np.abs(made.astype(int) - images).max() <= 1


class FakeEngine:
    """Deterministic pictures of (label, seed) through `Engine`'s interface."""

    image_size, device, label_names = 16, torch.device("cpu"), avatars.CLASSES

    def __init__(self) -> None:
        self.vae = AutoencoderKL(VAEConfig(block_out_channels=(8, 8), norm_num_groups=4)).eval()
        self.made: list[tuple[int, int]] = []

    def generate(self, labels: list, *, seeds: list, output: str, **settings: object) -> object:
        assert output == "np"
        pairs = list(zip(labels, seeds, strict=True))
        self.made += pairs
        images = np.concatenate([pictures(100 * label + seed, 1) for label, seed in pairs])
        return SimpleNamespace(images=images, settings=settings | {"model": "fake"})


@pytest.fixture
def fake_model(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """The whole command without a trained model; the first pixel of a picture is its number."""
    engine = FakeEngine()
    monkeypatch.setattr(engine_module.Engine, "from_pretrained", lambda _source: engine)

    def load(_cache: Path, split: str, per_class: int, size: int) -> ImageSet:
        assert (split, size) == ("held-out", 16)
        images = pictures(9, COUNT * per_class)
        images[:, 0, 0, 0] = np.arange(len(images))
        return ImageSet(images, np.repeat(np.arange(COUNT), per_class), avatars.CLASSES)

    monkeypatch.setattr(avatars, "load_avatars", load)
    return engine


def test_halves(fake_model: FakeEngine, network: FeatureNetwork, tmp_path: Path) -> None:
    halves = load_halves(tmp_path, 2, 16, network)
    assert halves.images_a[:5, 0, 0, 0].tolist() == [0, 1, 4, 5, 8]
    assert halves.features_a[:5, 0].tolist() == [0, 1, 4, 5, 8]
    assert halves.features_b[:5, 0].tolist() == [2, 3, 6, 7, 10]
    assert halves.labels.tolist() == [i // 2 for i in range(2 * COUNT)]


def test_command_writes_figures_settings_and_machine(
    fake_model: FakeEngine,
    network: FeatureNetwork,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--samples 30", "samples 30 is not a positive multiple of 16 classes"),
        ("--samples 32", "samples 32 is not above 1280, the features (--allow-few)"),
        ("--json no/such/out.json", "the directory no/such does not exist"),
        ("--model m", "labels of 'm' are ('cats', 'dogs')"),
        ("--model none", "model 'none' has no VAE"),
        ("--steps ten", "--steps: invalid int value: 'ten' (see dit-bench quality --help)"),
        ("--guidance-channels foo", "--guidance-channels: 'foo'"),
    ],
)
def test_bad_input_is_one_line(
    arguments: str, message: str, fake_model: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--model m" in arguments:
        fake_model.label_names = ("cats", "dogs")
    if "none" in arguments:
        fake_model.vae = None  # type: ignore[assignment]
    try:
        code = main(["quality", *arguments.split()])
    except SystemExit as left:  # of argparse
        code = left.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and message in error
