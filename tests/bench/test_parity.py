"""Paired sampling: nothing lies between eager and itself, a damaged backend is caught, and |ΔFD|
has an interval that holds what it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import COLOURS, colours
from products import require_int8
from tiny import tiny_engine
from torch import Tensor

from dit_bench.cli import main
from dit_bench.quality import features, parity
from dit_bench.quality.features import FeatureNetwork
from dit_bench.quality.frechet import Statistics, frechet_distance, moments_of
from dit_bench.quality.image_sets import ComparedSet, open_set
from dit_bench.quality.paired import (
    DistanceTo,
    SetComparison,
    interval,
    paired_bootstrap,
    set_comparison,
)
from dit_bench.quality.parity import compare, psnr, relative_errors, trajectory
from dit_bench.report import validate
from dit_engine import backends
from dit_engine.backends.eager import EagerBackend
from dit_engine.console.parser import Parser
from dit_engine.engine import Engine
from dit_engine.errors import BackendUnavailable

NETWORK = FeatureNetwork("lite0", "FD-Lite0", 3, colours, record={"features": "lite0"})
SETTINGS: dict[str, Any] = {"steps": 2, "sampler": "ddim", "seed": 0}


class Damaged(EagerBackend):
    """Eager, but its noise predictions are a fifth too large."""

    def prepare(self, labels: Tensor, timesteps: Tensor) -> Any:
        denoiser = super().prepare(labels, timesteps)
        return lambda x, step: denoiser(x, step) * 1.2


@pytest.fixture
def damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._FACTORIES, "damaged", (__name__, "Damaged"))


def sets(**options: Any) -> SetComparison:
    moments = Statistics(np.full(3, 0.5), 0.01 * np.eye(3))
    return SetComparison(NETWORK, ComparedSet("numbers", None), moments, **options)


def test_errors_are_those_of_the_formulas() -> None:
    reference = torch.ones(2, 3, 4, 2, 2)  # (steps, N, C, S, S)
    found = reference.clone()
    found[1, 2] += 0.25
    expected = np.zeros((2, 3))
    expected[1, 2] = 0.25
    assert relative_errors(found, reference) == pytest.approx(expected)
    images = torch.full((2, 3, 4, 4), 0.5)
    ratio = psnr(images + torch.tensor([0.1, 0.0]).view(2, 1, 1, 1), images)
    assert ratio[0] == pytest.approx(20.0, abs=1e-5) and np.isinf(ratio[1])


def test_a_trajectory_is_every_step_of_every_batch_and_ends_with_the_latents() -> None:
    engine = tiny_engine(max_batch_size=2)
    settings = {"steps": 3, "sampler": "ddim", "seed": 5, "backend": "eager"}
    latents, _ = trajectory(engine, [1, 2, 3], **settings)
    assert latents.shape[:2] == (3, 3)
    final = engine.generate([1, 2, 3], output="latent", **settings).images
    assert torch.equal(latents[-1], final)
    assert not torch.equal(latents[0], latents[1])


@pytest.mark.usefixtures("damaged")
def test_eager_is_not_far_from_itself_and_a_damaged_backend_is_caught() -> None:
    subjects = [("eager", "fp32"), ("lean", "fp32"), ("lean", "bf16"), ("damaged", "fp32")]
    rows = compare(tiny_engine(max_batch_size=16), [i % 10 for i in range(40)], subjects,
                   model="tiny", sets=sets(), **SETTINGS)  # fmt: skip
    same, lean, half, broken = (row["sets"] for row in rows)
    assert same["between"] == pytest.approx(0, abs=1e-12)
    assert same["absolute_difference"] == {"value": 0, "low": 0, "high": 0}
    assert same["to_reference"] == same["eager_to_reference"] > 0
    assert lean["absolute_difference"]["high"] < 1e-4
    wrong = broken["absolute_difference"]
    assert 0 < wrong["low"] <= wrong["value"] <= wrong["high"]  # 0 is not in the interval
    assert wrong["low"] > 100 * lean["absolute_difference"]["high"]
    assert broken["between"] > 1000 * abs(lean["between"])
    assert {row["n"] for row in (same, half, broken)} == {40} and same["resamples"] == 100
    assert rows[0]["latent_error_by_step"] == [0, 0] and rows[0]["psnr_db"]["min"] == np.inf
    assert 0 < rows[1]["final_latent_error"]["max"] < 1e-3 < rows[2]["final_latent_error"]["mean"]
    assert rows[2]["final_latent_error"]["mean"] < 0.5
    assert rows[2]["psnr_db"]["median"] < rows[1]["psnr_db"]["median"]


@pytest.mark.usefixtures("damaged")
def test_distances_are_those_of_the_images() -> None:
    """Against the images as the engine itself makes them."""
    engine = tiny_engine(max_batch_size=5)
    labels, of = [i % 10 for i in range(12)], sets(resamples=20)
    found = compare(engine, labels, [("damaged", "fp32")], sets=of, **SETTINGS)[0]["sets"]
    bad, good = (
        moments_of(colours(engine.generate(labels, backend=name, output="np", **SETTINGS).images)
                   .pooled)
        for name in ("damaged", "eager")
    )  # fmt: skip
    assert of.moments is not None
    expected = [frechet_distance(bad, good), frechet_distance(bad, of.moments),
                frechet_distance(good, of.moments)]  # fmt: skip
    keys = ("between", "to_reference", "eager_to_reference")
    assert [found[key] for key in keys] == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert found["difference"]["value"] == pytest.approx(expected[1] - expected[2], abs=1e-6)


def test_a_batch_that_is_made_again_in_halves_is_counted_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory runs out in the second step of four images."""
    honest = EagerBackend.prepare

    def prepare(self: EagerBackend, labels: Tensor, timesteps: Tensor) -> Any:
        denoise = honest(self, labels, timesteps)

        def small(x: Tensor, step: int) -> Tensor:
            if len(labels) == 8 and step == 1:  # guided: two rows per image
                raise MemoryError
            return denoise(x, step)

        return small

    whole, _ = trajectory(tiny_engine(), [0, 1, 2, 3], backend="eager", **SETTINGS)
    monkeypatch.setattr(EagerBackend, "prepare", prepare)
    with pytest.warns(UserWarning, match="out of memory with a batch of 4"):
        again, _ = trajectory(tiny_engine(), [0, 1, 2, 3], backend="eager", **SETTINGS)
    assert torch.equal(again, whole)


@pytest.mark.parametrize(("calls", "n", "resamples"), [(5, 4, 0), (9, 8, 1), (28, 8, 20)])
def test_an_interruption_keeps_what_is_finished(calls: int, n: int, resamples: int) -> None:
    """Two batches of two steps by two runs are eight calls; those of the bootstrap follow."""
    seen = 0

    def check() -> None:
        nonlocal seen
        seen += 1
        if seen >= calls:
            raise KeyboardInterrupt

    of, subject = sets(resamples=50), [("lean", "bf16")]
    (row,) = compare(tiny_engine(max_batch_size=4), list(range(8)), subject, sets=of, check=check,
                     **SETTINGS)  # fmt: skip
    assert row["n"] == n and row["interrupted"] and row["sets"]["n"] == n
    (whole,) = compare(tiny_engine(max_batch_size=4), list(range(n)), subject, **SETTINGS)
    assert row["final_latent_error"] == whole["final_latent_error"]
    found = row["sets"]
    if resamples:
        assert found["resamples"] == resamples
    none = found["absolute_difference"]["low"] is None and found["difference"]["high"] is None
    assert none == (found["resamples"] < 20)


def test_nan_is_told_from_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine, path = tiny_engine(), tmp_path / "a.json"
    honest = EagerBackend.prepare

    def prepare(self: EagerBackend, labels: Tensor, timesteps: Tensor) -> Any:
        denoise = honest(self, labels, timesteps)
        factor = float("nan") if self.dtype == torch.bfloat16 else 1.0
        return lambda x, step: denoise(x, step) * factor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EagerBackend, "prepare", prepare)
        patch.setattr(Engine, "from_pretrained", lambda *_, **__: engine)
        given = ["--subjects", "eager/fp32", "eager/bf16", "--samples", "3", "--steps", "2"]
        assert main(["parity", *given, "--sampler", "ddim", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    validate(report)
    same, broken = report["rows"]
    assert same["psnr_db"] == {"median": None, "min": None, "not_finite": 0}
    assert broken["psnr_db"] == {"median": None, "min": None, "not_finite": 3}
    assert same["final_latent_error"]["mean"] == 0 and broken["final_latent_error"]["mean"] is None
    shown = capsys.readouterr().out.splitlines()
    (equal,), (damaged,) = (
        [
            line
            for line in shown
            if (name in line and "equal" in line) or (name in line and "not finite" in line)
        ]
        for name in ("fp32", "bf16")
    )
    assert equal.split()[-2:] == ["equal", "equal"] and "equal" not in damaged


def test_the_reference_may_be_images_or_statistics(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", images)
    a = np.random.default_rng(1).normal(size=(20, 3))
    stored = {"mu": a.mean(0), "sigma": np.cov(a, rowvar=False)}
    np.savez(tmp_path / "stats.npz", mu_s=stored["mu"], sigma_s=stored["sigma"], **stored)
    with pytest.raises(ValueError, match="statistics of Inception's features"):
        NETWORK.accept(open_set(tmp_path / "stats.npz"), False)
    inception = FeatureNetwork("inception", "FID", 3, colours, 3)
    for network, name, mean, count in (
        (NETWORK, "images.npz", colours(images).pooled.mean(0), 9),
        (inception, "stats.npz", stored["mu"], None),
    ):
        reference = network.accept(open_set(tmp_path / name), False)
        moments = SetComparison(network, reference).with_moments().moments
        assert moments is not None and moments.count == count
        np.testing.assert_allclose(moments.mean, mean, rtol=1e-6)


def test_a_reference_is_read_once_quietly_and_can_be_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[int] = []

    def counted(images: np.ndarray) -> features.Extracted:
        read.append(len(images))
        return colours(images)

    network = FeatureNetwork("lite0", "FD-Lite0", 3, counted)
    images = np.random.default_rng(0).integers(0, 256, (70, 4, 4, 3)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", images)
    wanted = SetComparison(network, network.accept(open_set(tmp_path / "images.npz"), False))
    assert read == []
    pressed = iter([None, KeyboardInterrupt])

    def check() -> None:
        if (error := next(pressed)) is not None:
            raise error

    with pytest.raises(KeyboardInterrupt):
        wanted.with_moments(check=check)
    assert read == [32, 32]
    read.clear()
    found = wanted.with_moments(quiet=True)
    assert found.with_moments() is found and read == [32, 32, 6]
    assert found.moments is not None and found.moments.count == 70


def test_the_command_compares_sets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    require_int8()
    monkeypatch.setattr(features, "load_network", lambda *_: NETWORK)
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: tiny_engine())
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", images)
    path = tmp_path / "parity.json"
    common = ["parity", "--samples", "6", "--steps", "2", "--sampler", "ddim",
              "--subjects", "lean/int8", "--json", str(path)]  # fmt: skip

    def row(*arguments: str) -> dict[str, Any]:
        assert main([*common, *arguments]) == 0
        report = json.loads(path.read_text())
        validate(report)
        assert report["settings"]["steps"] == 2 and report["machine"]["cpu"]
        return report["rows"][0]

    found = row("--features", "lite0", "--reference-set", str(tmp_path / "images.npz"),
                "--resamples", "21")["sets"]  # fmt: skip
    assert (found["n"], found["n_reference"], found["resamples"]) == (6, 9, 21)
    text = capsys.readouterr().out
    assert f"{found['absolute_difference']['high']:.3g} (95%)" in text and "FID" not in text
    assert "reference" not in row("--features", "lite0")["sets"]
    alone = row()
    assert "sets" not in alone and 0 < alone["final_latent_error"]["mean"] < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--subjects", "lean"], "subject 'lean' is no backend/precision"),
        (["--samples", "0"], "samples 0 is not a positive integer"),
        (["--subjects", "eager/int4"], "subject 'eager/int4': precision 'int4' is none of fp32"),
        (["--subjects", "magic/fp32"], "backend 'magic' is unknown"),
        (["--features", "lite0", "--samples", "3"], "3 images are too few for 3 features; at leas"),
        (["--reference-set", "x", "--resamples", "19"], "resamples 19 is not at least 20"),
        (["--features", "lite0", "--resamples", "20"], "--resamples is for --reference-set, which"),
        (["--allow-few"], "--allow-few is for --features or --reference-set, which is not given"),
        (["--features", "lite0", "--reference-set", "absent"], "absent does not exist"),
        (["--features", "lite0", "--model", "no VAE"], "'no VAE' has no VAE; FD-Lite0 is of imag"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(features, "load_network", lambda *_: NETWORK)
    engine = tiny_engine(vae="no VAE" not in arguments)
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: engine)
    assert main(["parity", "--steps", "1", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_backend_that_cannot_run_is_told_before_anything_is_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, damaged: None
) -> None:
    def absent(*_: object) -> None:
        raise BackendUnavailable("backend 'damaged' needs a driver")

    monkeypatch.setattr(Damaged, "__init__", absent)
    monkeypatch.setattr(features, "load_network", lambda *_: pytest.fail("features were loaded"))
    given = ["parity", "--subjects", "damaged/fp32", "--features", "lite0", "--samples", "2"]
    assert main(given) == 2
    assert capsys.readouterr().err == "error: backend 'damaged' needs a driver\n"


def test_the_features_are_inceptions_unless_others_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(features, "load_network", lambda *a: asked.append(a) or COLOURS)
    parser = Parser("x", "y")
    parity.add_arguments(parser)
    with pytest.raises(FileNotFoundError):
        set_comparison(parser.parse_args(["--reference-set", "absent", "--allow-few"]),
                       torch.device("cpu"))  # fmt: skip
    assert asked == [("inception", None, torch.device("cpu"))]
    assert set_comparison(parser.parse_args([]), torch.device("cpu")) is None


def test_the_interval_holds_what_other_samples_would_give() -> None:
    """Few vectors of many features: resampling then moves a Fréchet distance by more than its
    spread, which must not move the interval."""
    rng = np.random.default_rng(0)
    d, n = 12, 24
    reference = Statistics(np.zeros(d), np.eye(d))
    distance = DistanceTo(reference)

    def pair() -> tuple[np.ndarray, np.ndarray, float]:
        b = rng.normal(size=(n, d))
        a = 1.3 * b + 0.05 * rng.normal(size=(n, d))
        return a, b, distance(moments_of(a)) - distance(moments_of(b))

    expected = np.mean([pair()[2] for _ in range(2000)])
    held, held_by_percentiles, trials = 0, 0, 80
    for trial in range(trials):
        a, b, value = pair()
        draws = paired_bootstrap(a, b, reference, 100, seed=trial)
        low, high = interval(draws, value)
        assert low <= value <= high
        held += low <= expected <= high
        low, high = np.quantile(draws, [0.025, 0.975])
        held_by_percentiles += low <= expected <= high
    assert held / trials > 0.85
    assert held_by_percentiles < held
