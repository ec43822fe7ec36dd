"""Paired sampling: errors are those of tensors made by hand, and nothing differs from itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from products import require_int8
from tiny import tiny_engine

from dit_bench.quality.fd_lite0 import write_report
from dit_bench.quality.parity import compare, format_report, main, psnr, relative_errors, trajectory
from dit_engine.backends.eager import EagerBackend


def test_errors_of_tensors_made_by_hand() -> None:
    reference = torch.ones(2, 3, 4, 2, 2)
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


def test_the_reference_does_not_differ_from_itself_and_half_precision_does() -> None:
    engine = tiny_engine()
    subjects = [("eager", "fp32"), ("lean", "fp32"), ("lean", "bf16")]
    report = compare(engine, [0, 1], subjects, steps=2, sampler="ddim", seed=0)
    same, lean, half = report["subjects"]
    assert same["latent_error_by_step"] == [0, 0] and same["psnr_db"]["min"] == np.inf
    assert 0 < lean["final_latent_error"]["max"] < 1e-3 < half["final_latent_error"]["mean"] < 0.5
    assert half["psnr_db"]["median"] < lean["psnr_db"]["median"]
    assert report["n"] == 2 and len(format_report({"model": "tiny", **report}).splitlines()) == 5


def test_the_command_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_int8()
    path = tmp_path / "parity.json"
    arguments = ["--samples", "2", "--steps", "8", "--sampler", "dpm++", "--json", str(path)]
    assert main([*arguments, "--subjects", "lean/int8"]) == 0
    report = json.loads(path.read_text())
    (row,) = report["subjects"]
    assert 0 < row["final_latent_error"]["mean"] < 0.2
    assert f"{row['final_latent_error']['mean']:.2e}" in capsys.readouterr().out
    assert report["settings"]["steps"] == 8 and report["hardware"]["cpu"]


def test_nan_is_told_from_equal_in_json(tmp_path: Path) -> None:
    engine = tiny_engine()
    honest = EagerBackend.prepare

    def prepare(self: EagerBackend, labels: torch.Tensor, timesteps: torch.Tensor) -> Any:
        denoise = honest(self, labels, timesteps)
        factor = float("nan") if self.dtype == torch.bfloat16 else 1.0
        return lambda x, step: denoise(x, step) * factor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EagerBackend, "prepare", prepare)
        subjects = [("eager", "fp32"), ("eager", "bf16")]
        report = compare(engine, [0, 1, 2], subjects, steps=2, sampler="ddim", seed=0)
    write_report(report, tmp_path / "a.json")
    same, broken = json.loads((tmp_path / "a.json").read_text())["subjects"]
    assert same["psnr_db"] == {"median": None, "min": None, "not_finite": 0}
    assert broken["psnr_db"] == {"median": None, "min": None, "not_finite": 3}
    assert same["final_latent_error"]["mean"] == 0 and broken["final_latent_error"]["mean"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--subjects", "lean"], "subject 'lean' is no backend/precision"),
        (["--samples", "0"], "samples 0 is not a positive integer"),
        (["--subjects", "eager/int4"], "subject 'eager/int4': precision 'int4' is none of fp32"),
        (["--subjects", "magic/fp32"], "backend 'magic' is unknown"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--steps", "1"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
