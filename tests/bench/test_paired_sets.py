"""Set against set: nothing lies between eager and itself, a damaged backend is caught."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_engine
from torch import Tensor

from dit_bench.quality import parity
from dit_bench.quality.features import Extracted, FeatureNetwork
from dit_bench.quality.frechet import Statistics, frechet_distance, moments_of
from dit_bench.quality.metrics import DistanceTo, paired_bootstrap
from dit_bench.quality.paired_sets import (
    Reference,
    SetComparison,
    interval,
    open_reference,
    read_reference,
)
from dit_bench.quality.parity import compare, format_report, main
from dit_engine import backends
from dit_engine.backends.eager import EagerBackend
from dit_engine.engine import Engine
from dit_engine.errors import BackendUnavailable


def colours(images: np.ndarray) -> Extracted:
    return Extracted((images.astype(np.float32) / 255).mean(axis=(1, 2)))


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
    reference = Reference("numbers", Statistics(np.full(3, 0.5), 0.01 * np.eye(3)))
    return SetComparison(NETWORK, reference, **options)


@pytest.mark.usefixtures("damaged")
def test_eager_is_not_far_from_itself_and_a_damaged_backend_is_caught() -> None:
    engine = tiny_engine(max_batch_size=16)
    subjects = [("eager", "fp32"), ("lean", "fp32"), ("damaged", "fp32")]
    report = compare(engine, [i % 10 for i in range(40)], subjects, sets=sets(), **SETTINGS)
    same, lean, broken = (row["sets"] for row in report["subjects"])
    assert same["between"] == pytest.approx(0, abs=1e-12)
    assert same["absolute_difference"] == {"value": 0, "low": 0, "high": 0}
    assert same["to_reference"] == same["eager_to_reference"] > 0
    assert lean["absolute_difference"]["high"] < 1e-4
    wrong = broken["absolute_difference"]
    assert 0 < wrong["low"] <= wrong["value"] <= wrong["high"]  # 0 is not in the interval
    assert wrong["low"] > 100 * lean["absolute_difference"]["high"]
    assert broken["between"] > 1000 * abs(lean["between"])
    assert {row["n"] for row in (same, lean, broken)} == {40} and same["resamples"] == 100
    assert report["subjects"][0]["latent_error_by_step"] == [0, 0]
    text = format_report({"model": "tiny", **report})
    assert text.count("100 paired resamples of N = 40") == 3
    assert f"FD-Lite0 to eager's set {same['between']:.4g} (N = 40 pairs)" in text


@pytest.mark.usefixtures("damaged")
def test_distances_are_those_of_the_images() -> None:
    """Against the images as the engine itself makes them."""
    engine = tiny_engine(max_batch_size=5)
    labels = [i % 10 for i in range(12)]
    report = compare(engine, labels, [("damaged", "fp32")], sets=sets(resamples=20), **SETTINGS)
    found = report["subjects"][0]["sets"]
    features = [
        colours(engine.generate(labels, backend=name, output="np", **SETTINGS).images).pooled
        for name in ("damaged", "eager")
    ]
    bad, good = (moments_of(f) for f in features)
    target = sets().reference.moments
    expected = [frechet_distance(bad, good), frechet_distance(bad, target),
                frechet_distance(good, target)]  # fmt: skip
    keys = ("between", "to_reference", "eager_to_reference")
    assert [found[key] for key in keys] == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert found["difference"]["value"] == pytest.approx(expected[1] - expected[2], abs=1e-6)


def test_errors_are_the_same_in_batches_of_any_size() -> None:
    labels, subjects = [1, 2, 3, 4, 5], [("lean", "bf16")]
    whole, parts = (
        compare(tiny_engine(max_batch_size=n), labels, subjects, **SETTINGS) for n in (8, 2)
    )
    a, b = (report["subjects"][0]["final_latent_error"] for report in (whole, parts))
    assert a["mean"] == pytest.approx(b["mean"], rel=0.05) and parts["n"] == 5


def test_ctrl_c_keeps_the_finished_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(max_batch_size=4)
    whole = compare(engine, [0, 1, 2, 3], [("lean", "bf16")], **SETTINGS)
    calls = iter(range(100))
    trajectory = parity.trajectory

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 3:  # the second batch's subject
            raise KeyboardInterrupt
        return trajectory(*arguments, **options)

    monkeypatch.setattr(parity, "trajectory", interrupted)
    report = compare(
        engine, list(range(8)), [("lean", "bf16")], sets=sets(resamples=20), **SETTINGS
    )
    assert report["n"] == 4 and report["interrupted"]
    row = report["subjects"][0]
    assert row["final_latent_error"] == whole["subjects"][0]["final_latent_error"]
    assert row["sets"]["n"] == 4
    assert "interrupted after 4 images" in format_report({"model": "tiny", **report})


def test_the_reference_may_be_images_or_statistics(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", images)
    reference = read_reference(open_reference(tmp_path / "images.npz", NETWORK), NETWORK)
    np.testing.assert_allclose(reference.moments.mean, colours(images).pooled.mean(0), rtol=1e-6)
    assert reference.moments.count == 9
    a = np.random.default_rng(1).normal(size=(20, 3))
    stored = {"mu": a.mean(0), "sigma": np.cov(a, rowvar=False)}
    stored |= {"mu_s": a.mean(0), "sigma_s": stored["sigma"]}
    np.savez(tmp_path / "stats.npz", **stored)
    with pytest.raises(ValueError, match="statistics of Inception's features"):
        open_reference(tmp_path / "stats.npz", NETWORK)
    inception = FeatureNetwork("inception", "FID", 3, colours, 3)
    stored_moments = read_reference(open_reference(tmp_path / "stats.npz", inception), inception)
    np.testing.assert_allclose(stored_moments.moments.mean, stored["mu"])


def test_a_reference_is_read_once_quietly_and_can_be_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = []

    def counted(images: np.ndarray) -> Extracted:
        read.append(len(images))
        return colours(images)

    network = FeatureNetwork("lite0", "FD-Lite0", 3, counted)
    images = np.random.default_rng(0).integers(0, 256, (70, 4, 4, 3)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", images)
    wanted = SetComparison(network, unread=open_reference(tmp_path / "images.npz", network))
    assert read == []
    pressed = iter([None, KeyboardInterrupt])

    def check() -> None:
        if (error := next(pressed)) is not None:
            raise error

    with pytest.raises(KeyboardInterrupt):
        wanted.with_reference(check=check)
    assert read == [32, 32]
    read.clear()
    found = wanted.with_reference(quiet=True)
    assert found.with_reference() is found and read == [32, 32, 6]
    assert found.reference is not None and found.reference.moments.count == 70
    with pytest.MonkeyPatch.context() as patch:
        shown = []
        patch.setattr(
            "dit_engine.console.bars.Bar", lambda *_, disable, **__: shown.append(disable) or bar()
        )
        wanted.with_reference(quiet=True)
        wanted.with_reference()
    assert shown == [True, False]


def bar() -> Any:
    return contextlib.nullcontext(SimpleNamespace(update=lambda *_: None))


def test_the_command_compares_sets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "load_network", lambda *_: NETWORK)
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: tiny_engine())
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", images)
    path = tmp_path / "parity.json"
    common = ["--samples", "6", "--steps", "2", "--sampler", "ddim", "--subjects", "lean/bf16",
              "--json", str(path)]  # fmt: skip
    wanted = ["--features", "lite0", "--reference-set", str(tmp_path / "images.npz")]
    assert main([*common, *wanted, "--resamples", "21"]) == 0
    row = json.loads(path.read_text())["subjects"][0]["sets"]
    assert (row["n"], row["n_reference"], row["resamples"]) == (6, 9, 21)
    text = capsys.readouterr().out
    assert "|ΔFD-Lite0|" in text and "95% interval" in text and "FID" not in text
    assert main([*common, "--features", "lite0"]) == 0
    row = json.loads(path.read_text())["subjects"][0]["sets"]
    assert set(row) == {"metric", "n", "between"}
    assert main(common) == 0
    assert "sets" not in json.loads(path.read_text())["subjects"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--features", "lite0", "--samples", "3"], "3 images are too few for 3 features; at leas"),
        (["--reference-set", "x", "--resamples", "19"], "resamples 19 is not at least 20"),
        (["--features", "lite0", "--resamples", "20"], "--resamples is for --reference-set, which"),
        (["--allow-few"], "--allow-few is for --features or --reference-set, which is not given"),
        (["--features", "lite0", "--reference-set", "absent"], "absent does not exist"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parity, "load_network", lambda *_: NETWORK)
    assert main(["--steps", "1", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_sets_need_images(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(vae=False)
    with pytest.raises(ValueError, match="no VAE; Fréchet distances are of images"):
        compare(engine, [0] * 9, [("lean", "fp32")], sets=sets(), **SETTINGS)
    monkeypatch.setattr(parity, "load_network", lambda *_: NETWORK)
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: engine)
    assert main(["--features", "lite0", "--steps", "1"]) == 2
    assert "model 'builtin' has no VAE; FD-Lite0 is of images" in capsys.readouterr().err


def test_a_backend_that_cannot_run_is_told_before_anything_is_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: object) -> None:
        raise BackendUnavailable("backend 'damaged' needs a driver")

    def read(*_: object) -> None:
        raise AssertionError("features were loaded")

    monkeypatch.setattr(Damaged, "__init__", absent)
    monkeypatch.setitem(backends._FACTORIES, "damaged", (__name__, "Damaged"))
    monkeypatch.setattr(parity, "load_network", read)
    assert main(["--subjects", "damaged/fp32", "--features", "lite0", "--samples", "2"]) == 2
    assert capsys.readouterr().err == "error: backend 'damaged' needs a driver\n"


def test_the_features_are_inceptions_unless_others_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(parity, "load_network", lambda *a: asked.append(a) or NETWORK)
    arguments = parity.build_parser().parse_args(["--reference-set", "absent", "--allow-few"])
    with pytest.raises(FileNotFoundError):
        parity.set_comparison(arguments, torch.device("cpu"))
    assert asked == [("inception", None, torch.device("cpu"))]
    nothing = parity.build_parser().parse_args([])
    assert parity.set_comparison(nothing, torch.device("cpu")) is None


@pytest.mark.parametrize(("calls", "n", "resamples"), [(5, 4, 0), (9, 8, 1), (28, 8, 20)])
def test_a_check_that_interrupts_keeps_what_is_finished(calls: int, n: int, resamples: int) -> None:
    """Two batches of two steps by two runs are eight calls; those of the bootstrap follow."""
    seen = 0

    def check() -> None:
        nonlocal seen
        seen += 1
        if seen >= calls:
            raise KeyboardInterrupt

    engine = tiny_engine(max_batch_size=4)
    of = sets(resamples=50) if resamples else None
    report = compare(engine, list(range(8)), [("lean", "fp32")], sets=of, check=check, **SETTINGS)
    assert report["n"] == n and report["interrupted"]
    if resamples:
        found = report["subjects"][0]["sets"]
        assert found["resamples"] == resamples
        none = found["absolute_difference"]["low"] is None and found["difference"]["high"] is None
        assert none == (resamples < 20)
        text = format_report({"model": "tiny", **report})
        assert ("no interval below 20 resamples" in text) == none
        assert ("95% interval" in text) != none


def test_a_batch_that_is_made_again_in_halves_is_counted_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory runs out in the second step of four images."""
    honest = EagerBackend.prepare

    def prepare(self: EagerBackend, labels: Tensor, timesteps: Tensor) -> Any:
        denoise = honest(self, labels, timesteps)

        def small(x: Tensor, step: int) -> Tensor:
            if len(labels) == 8 and step == 1:  # guided: two rows an image
                raise MemoryError
            return denoise(x, step)

        return small

    whole, _ = parity.trajectory(tiny_engine(), [0, 1, 2, 3], backend="eager", **SETTINGS)
    monkeypatch.setattr(EagerBackend, "prepare", prepare)
    with pytest.warns(UserWarning, match="out of memory with a batch of 4"):
        again, _ = parity.trajectory(tiny_engine(), [0, 1, 2, 3], backend="eager", **SETTINGS)
    assert torch.equal(again, whole)


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
