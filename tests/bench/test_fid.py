"""dit-bench fid: figures of sets whose features are known, their names and N, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import COLOURS, colours
from PIL import Image
from tiny import tiny_engine

from dit_bench.cli import main
from dit_bench.quality import fid, inception, lite0
from dit_bench.quality.features import Extracted, FeatureNetwork, load_network
from dit_bench.quality.metrics import frechet_distance, moments_of
from dit_bench.report import validate
from dit_engine.engine import Engine

Rows = dict[str, dict[str, Any]]


def pixels(n: int, seed: int, low: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    tint = rng.integers(low, 256, (n, 1, 1, 3))
    return ((tint + rng.integers(0, 256, (n, 8, 8, 3))) // 2).astype(np.uint8)


def saved(path: Path, *images: np.ndarray, **arrays: np.ndarray) -> str:
    np.savez(path, *images, **arrays)
    return str(path)


def stored_moments(images: np.ndarray) -> dict[str, np.ndarray]:
    pooled, spatial, _ = colours(images)
    p, s = moments_of(pooled), moments_of(spatial)
    return {"mu": p.mean, "sigma": p.covariance, "mu_s": s.mean, "sigma_s": s.covariance}


@pytest.fixture
def weights_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fid, "load_network", lambda *_: COLOURS)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Rows, dict[str, Any]]:
    """The rows by metric, and the settings."""
    assert main(["fid", *arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    validate(report)
    return {row["metric"]: row for row in report["rows"]}, report["settings"]


@pytest.mark.usefixtures("weights_free")
def test_figures_are_those_of_the_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = pixels(90, 0), pixels(70, 1, low=60)
    found, _ = run(capsys, saved(tmp_path / "a.npz", a), saved(tmp_path / "b.npz", b),
                   "--batch-size", "16")  # fmt: skip
    ea, eb = colours(a), colours(b)
    for name, kind in (("FID", 0), ("sFID", 1)):
        expected = frechet_distance(moments_of(ea[kind]), moments_of(eb[kind]))
        assert found[name]["distance"] == pytest.approx(expected, rel=1e-6)
    p = np.exp(ea[2].astype(np.float64))
    score = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    assert found["Inception Score"]["distance"] == pytest.approx(score, rel=1e-6)
    assert found["Inception Score"]["remark"] == "1 split of up to 5000"
    assert 0.3 < found["precision"]["distance"] < found["recall"]["distance"] <= 1  # a is wider
    for name, row in found.items():
        assert (row["n"], row.get("n_reference", 70)) == (90, 70), name


@pytest.mark.usefixtures("weights_free")
def test_statistics_stand_for_the_images_that_they_were_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = pixels(50, 3), pixels(40, 4)
    of_a = saved(tmp_path / "a.npz", a)
    references = [
        saved(tmp_path / "b.npz", b),
        saved(tmp_path / "stats.npz", **stored_moments(b)),
        saved(tmp_path / "adm.npz", b[:10], **stored_moments(b)),  # as ADM's: a part of the images
    ]
    with_images, alone, both = (run(capsys, of_a, path)[0] for path in references)
    for name in ("FID", "sFID"):
        expected = with_images[name]["distance"]
        for found in (alone[name], both[name]):
            assert found["distance"] == pytest.approx(expected, rel=1e-6, abs=1e-9)
            assert found["n"] == 50 and found["n_reference"] is None
    for name in ("precision", "recall"):
        assert alone[name]["distance"] is None and alone[name]["n_reference"] is None
        assert alone[name]["reason"].endswith("stats.npz holds statistics, no images")
        assert both[name]["n_reference"] == 10
    assert main(["fid", of_a, references[1]]) == 0
    assert "unknown, statistics only" in capsys.readouterr().out


@pytest.mark.usefixtures("weights_free")
def test_a_live_model_equals_its_images_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: engine)
    made = engine.generate([i % 10 for i in range(12)], seeds=list(range(7, 19)), output="np",
                           steps=2, sampler="ddim", guidance_scale=1.5).images  # fmt: skip
    reference = saved(tmp_path / "reference.npz", pixels(30, 5))
    live, settings = run(capsys, reference, "--model", "tiny", "--samples", "12", "--first-seed",
                         "7", "--steps", "2", "--sampler", "ddim", "--batch-size",
                         "5")  # fmt: skip
    stored, _ = run(capsys, saved(tmp_path / "made.npz", made), reference)
    for name, row in stored.items():
        assert live[name]["distance"] == pytest.approx(row["distance"], rel=1e-9), name
    assert (settings["steps"], settings["guidance_scale"], settings["first_seed"]) == (2, 1.5, 7)
    assert [side["size"] for side in settings["sets"]] == [[16, 16], [8, 8]]
    assert (settings["sampler"], settings["samples"]) == ("ddim", 12)


@pytest.mark.parametrize("name", ["lite0", "inception"])
def test_features_are_computed_without_tf32(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As seen from within the network; the other settings of cuDNN stay."""
    cudnn, names = torch.backends.cudnn, ("allow_tf32", "enabled", "benchmark", "deterministic")
    seen: list[list[bool]] = []

    def settings() -> list[bool]:
        return [getattr(cudnn, each) for each in names]

    def network(x: torch.Tensor) -> Any:
        seen.append(settings())
        rows = x.flatten(1)[:, :3]
        return rows if name == "lite0" else (rows, rows, rows)

    monkeypatch.setattr(lite0, "load_lite0", lambda device: network)
    monkeypatch.setattr(inception, "load_inception", lambda path, device: network)
    monkeypatch.setattr(inception, "DIGEST", "")
    (tmp_path / "weights.pth").write_bytes(b"none")
    made = load_network(name, None if name == "lite0" else tmp_path / "weights.pth")
    for on in (True, False):
        with cudnn.flags(allow_tf32=True, enabled=on, benchmark=not on, deterministic=on):
            made.extract(pixels(2, 0))
            assert seen.pop() == [False, on, not on, on] and settings() == [True, on, not on, on]


def test_lite0_is_never_called_fid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = FeatureNetwork("lite0", "FD-Lite0", 3, lambda x: Extracted(colours(x).pooled))
    monkeypatch.setattr(fid, "load_network", lambda *_: network)
    sets = [saved(tmp_path / f"{n}.npz", pixels(n, n)) for n in (6, 3)]
    assert main(["fid", *sets, "--features", "lite0", "--allow-few"]) == 0
    text = capsys.readouterr().out
    (line,) = (line.split() for line in text.splitlines() if " FD-Lite0 " in line)
    assert line[line.index("FD-Lite0") + 2 :][:2] == ["6", "3"]
    for part in ("CAUTION: fewer images than the 3 features", "precision (lite0 features)",
                 "3 images are too few for 3 neighbours"):  # fmt: skip
        assert part in text
    assert "FID" not in text and "Inception" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.npz"], "1 sets (a.npz) are given; SAMPLES and REFERENCE must be"),
        (["a.npz", "a.npz", "--model", "builtin"], "the REFERENCE alone beside --model must be"),
        (["a.npz", "a.npz"], "a.npz has 5 images, too few for 2048 features; at least 2049"),
        (["a.npz", "stats.npz", "--allow-few"], "statistics of [3, 2] features; [2048, 2023] are"),
        (["a.npz", "a.npz", "--features", "lite0", "--inception-weights", "w.pth"],
         "w.pth: --features lite0 reads none"),
        (["a.npz", "stats.npz", "--features", "lite0", "--allow-few"],
         "statistics of Inception's features; "),
        (["a.npz", "a.npz", "--batch-size", "0"], "batch size 0 is not a positive integer"),
        (["a.npz", "--model", "builtin", "--samples", "-2"], "samples -2 is not a positive"),
        (["a.npz", "--model", "builtin", "--samples", "3", "--steps", "0", "--allow-few"],
         "steps 0"),
        (["a.npz", "--model", "no VAE"], "model 'no VAE' has no VAE"),
        (["folder", "folder", "--allow-few"], "1.png is damaged"),
        (["--model", "builtin", "a.npz", "--json", "a.npz"], "'a.npz' is no .json file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("a.npz"), pixels(5, 14))
    saved(Path("stats.npz"), **stored_moments(pixels(9, 15)))
    Path("folder").mkdir()
    for i, image in enumerate(pixels(2, 17)):
        Image.fromarray(image).save(f"folder/{i}.png")
    Path("folder/1.png").write_bytes(Path("folder/1.png").read_bytes()[:-40])
    engine = tiny_engine(vae="no VAE" not in arguments)
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: engine)
    wide = FeatureNetwork("inception", "FID", 2048, colours, 2023)
    monkeypatch.setattr("dit_bench.quality.features._inception", lambda *_: wide)
    monkeypatch.setattr(lite0, "load_lite0", lambda device: None)
    try:
        code = main(["fid", *arguments])
    except SystemExit as left:  # of argparse
        code = left.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert message in captured.err and captured.err.count("\n") == 1
