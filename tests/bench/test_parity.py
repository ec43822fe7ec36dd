"""Paired sampling: nothing lies between eager and itself, a damaged backend is caught, and NaN,
references and bad arguments are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import colours
from products import require_int8
from tiny import tiny_engine
from torch import Tensor

from dit_bench.cli import main
from dit_bench.quality import features
from dit_bench.quality.features import FeatureNetwork
from dit_bench.quality.image_sets import ComparedSet
from dit_bench.quality.metrics import Statistics, frechet_distance, moments_of
from dit_bench.quality.paired import SetComparison
from dit_bench.quality.parity import compare, psnr, relative_errors
from dit_bench.report import validate
from dit_bench.speed.generation import Recorder
from dit_engine import backends
from dit_engine.backends.eager import EagerBackend
from dit_engine.engine import Engine
from dit_engine.errors import BackendUnavailable

NETWORK = FeatureNetwork("lite0", "FD-Lite0", 3, colours, record={"features": "lite0"})
SETTINGS: dict[str, Any] = {"steps": 2, "sampler": "ddim", "seed": 0}


class Damaged(EagerBackend):
    """Eager, but its noise predictions are a fifth too large, and not finite in bfloat16."""

    def prepare(self, labels: Tensor, timesteps: Tensor) -> Any:
        denoiser = super().prepare(labels, timesteps)
        factor = float("nan") if self.dtype == torch.bfloat16 else 1.2
        return lambda x, step: denoiser(x, step) * factor


@pytest.fixture(autouse=True)
def damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._FACTORIES, "damaged", (__name__, "Damaged"))
    monkeypatch.setattr(features, "load_network", lambda *_: NETWORK)


def sets(**options: Any) -> SetComparison:
    moments = Statistics(np.full(3, 0.5), 0.01 * np.eye(3))
    return SetComparison(NETWORK, ComparedSet("numbers"), moments, **options)


def report_of(path: Path, *arguments: str) -> dict[str, Any]:
    given = ["--steps", "2", "--sampler", "ddim", "--samples", "6", "--json", str(path)]
    assert main(["parity", *given, *arguments]) == 0
    report = json.loads(path.read_text())
    validate(report)
    assert report["settings"]["steps"] == 2 and report["machine"]["cpu"]
    return report


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
    whole, again = Recorder(), Recorder()
    tiny_engine().generate([0, 1, 2, 3], callback=whole, backend="eager", **SETTINGS)
    honest = EagerBackend.prepare

    def prepare(self: EagerBackend, labels: Tensor, timesteps: Tensor) -> Any:
        denoise = honest(self, labels, timesteps)

        def small(x: Tensor, step: int) -> Tensor:
            if len(labels) == 8 and step == 1:  # guided: two rows per image
                raise MemoryError
            return denoise(x, step)

        return small

    monkeypatch.setattr(EagerBackend, "prepare", prepare)
    with pytest.warns(UserWarning, match="out of memory with a batch of 4"):
        tiny_engine().generate([0, 1, 2, 3], callback=again, backend="eager", **SETTINGS)
    assert torch.equal(again.latents(), whole.latents()) and len(whole.latents()) == 2


def test_nan_is_told_from_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: tiny_engine())
    same, broken = report_of(tmp_path / "a.json", "--subjects", "eager/fp32", "damaged/bf16")[
        "rows"
    ]
    assert same["psnr_db"] == {"median": None, "min": None, "not_finite": 0}
    assert broken["psnr_db"] == {"median": None, "min": None, "not_finite": 6}
    assert same["final_latent_error"]["mean"] == 0 and broken["final_latent_error"]["mean"] is None


def test_the_command_compares_sets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    require_int8()
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: tiny_engine())
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", images)
    int8 = (tmp_path / "a.json", "--subjects", "lean/int8")
    found = report_of(*int8, "--features", "lite0", "--reference-set", str(tmp_path / "images.npz"),
                      "--resamples", "21")["rows"][0]["sets"]  # fmt: skip
    assert (found["n"], found["n_reference"], found["resamples"]) == (6, 9, 21)
    text = capsys.readouterr().out
    assert (
        f"{found['absolute_difference']['high']:.3g}   " in text
        and "95%" in text
        and "FID" not in text
    )
    (alone,) = report_of(*int8)["rows"]
    assert "sets" not in alone and 0 < alone["final_latent_error"]["mean"] < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--subjects", "lean"], "subject 'lean' is no backend/precision, such as lean/bf16, of"),
        (["--subjects", "eager/int4"], "subject 'eager/int4' is no backend/precision"),
        (["--samples", "0"], "samples 0 is not a positive integer"),
        (["--subjects", "magic/fp32"], "backend 'magic' is unknown"),
        (["--features", "lite0", "--samples", "3"], "3 images are too few for 3 features; at leas"),
        (["--reference-set", "x", "--resamples", "19"], "resamples 19 is not at least 20"),
        (["--features", "lite0", "--resamples", "20"], "--resamples is for --reference-set, which"),
        (["--allow-few"], "--allow-few is for --features or --reference-set, which is not given"),
        (["--features", "lite0", "--model", "no VAE"], "'no VAE' has no VAE; FD-Lite0 is of imag"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = tiny_engine(vae="no VAE" not in arguments)
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: engine)
    assert main(["parity", "--steps", "1", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_what_cannot_run_is_told_before_a_reference_is_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: object) -> None:
        raise BackendUnavailable("backend 'damaged' needs a driver")

    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(features, "load_network", lambda *given: asked.append(given) or NETWORK)
    given = ["parity", "--reference-set", "absent", "--samples", "4", "--steps", "1", "--subjects"]
    assert main([*given, "eager/fp32"]) == 2 and asked[0][:2] == ("inception", None)
    assert "absent does not exist" in capsys.readouterr().err
    monkeypatch.setattr(Damaged, "__init__", absent)
    assert main([*given, "damaged/fp32"]) == 2 and len(asked) == 1
    assert capsys.readouterr().err == "error: backend 'damaged' needs a driver\n"
