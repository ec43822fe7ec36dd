"""The scaling study end to end on a small run: equal conditions, resumption, the figure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dit_bench import scaling, scaling_measure
from dit_bench.cost import dit_cost, total
from dit_bench.scaling import folder, main, networks
from dit_bench.scaling_measure import macs_of, orders, plot, sample
from dit_engine.io.files import save_tensors


def test_the_networks_cost_what_they_are_compared_for() -> None:
    made = {name: make() for name, make in networks(4, 16, 16).items()}
    macs = {name: macs_of(network, 16) for name, network in made.items()}
    for name in ("DiT small/4", "DiT small/2", "DiT large/4", "DiT large/2"):
        # The formula leaves out nothing that is counted.
        assert macs[name] == pytest.approx(total(dit_cost(made[name].config)).macs, rel=1e-3)
    assert list(macs.values())[:4] != sorted(list(macs.values())[:4])  # two sizes cross
    assert 1 < macs["U-Net"] / macs["DiT large/2"] < 1.03  # no handicap for the U-Net


def test_an_image_depends_on_its_seed_and_label_alone() -> None:
    torch.manual_seed(0)
    network = networks(4, 16, 16)["DiT small/4"]()
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.02)
    network.to(torch.bfloat16).eval()
    both = sample(network, [1, 2], [7, 8], 16)
    alone = sample(network, [2], [8], 16)
    assert both.shape == (2, 4, 16, 16)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=0.05)
    assert (both[0] - both[1]).abs().max() > 1


def test_training_is_the_same_for_all_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "BATCH", 2)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(6, 4, 8, 8, generator=generator)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    tensors = {"means": latents, "deviations": torch.ones_like(latents), "labels": labels}
    save_tensors(tensors, run / "latents.safetensors")
    arguments = ["train", "--run", str(run), "-o", str(out), "--steps", "2"]
    assert main([*arguments, "--only", "DiT small/4", "U-Net"]) == 0
    for name in ("DiT small/4", "U-Net"):
        half, whole = (load_file(out / folder(name) / f"ema-00000{k}.safetensors") for k in (1, 2))
        assert any(not torch.equal(half[key], whole[key]) for key in half)
    assert not (out / "dit-large-2").exists()
    assert main([*arguments, "--only", "DiT huge/2"]) == 2
    assert "network 'DiT huge/2' is unknown; choose among DiT small/4" in capsys.readouterr().err
    assert main(["train", "--run", "nowhere", "-o", str(out)]) == 2
    assert "--run is a directory of dit-train" in capsys.readouterr().err


def rows() -> list[dict]:
    values = {("DiT small/4", 10): (1e7, 90.0), ("DiT large/2", 10): (2e8, 60.0),
              ("DiT small/2", 10): (5e7, 70.0), ("U-Net", 10): (2e8, 65.0)}  # fmt: skip
    return [
        {
            "network": n,
            "steps": s,
            "gmacs": m / 1e9,
            "distance": d,
            "n": 4,
            "n_reference": 4,
        }
        for (n, s), (m, d) in values.items()
    ]


def test_orders_are_by_cost_and_leave_out_the_unet() -> None:
    assert orders(rows(), 10) == [
        ("DiT small/4", 0.01, 90.0), ("DiT small/2", 0.05, 70.0), ("DiT large/2", 0.2, 60.0),
    ]  # fmt: skip
    assert orders(rows(), 5) == []


def test_the_figure_shows_every_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import axes

    drawn: list[tuple[list[float], list[float]]] = []
    plain = axes.Axes.plot

    def keep(self, x, y, *more, **options):
        drawn.append((np.atleast_1d(x).tolist(), np.atleast_1d(y).tolist()))
        return plain(self, x, y, *more, **options)

    monkeypatch.setattr(axes.Axes, "plot", keep)
    plot({"metric": "FD-Lite0", "points": rows()}, tmp_path / "figure.png")
    assert drawn == [([0.01, 0.05, 0.2], [90.0, 70.0, 60.0]), ([0.2], [65.0])]
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.size[0] > 400 and np.asarray(picture.convert("L")).std() > 10


def test_what_was_measured_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "measured.json"
    kept.write_text(json.dumps(rows()))
    made = {"DiT small/4": networks(4, 16, 16)["DiT small/4"]}
    (tmp_path / "dit-small-4").mkdir()
    folders = {"DiT small/4": tmp_path / "dit-small-4"}
    monkeypatch.setattr(scaling_measure, "load_lite0", lambda: None)
    vae = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"ema-000010\.safetensors does not exist: train"):
        scaling_measure.measure(made, folders, [10], vae, tmp_path, 4, kept, 16)
    (tmp_path / "dit-small-4" / "ema-000010.safetensors").touch()
    monkeypatch.setattr(scaling_measure, "LatentDecoder", lambda *_: None)
    report = scaling_measure.measure(made, folders, [10], vae, tmp_path, 4, kept, 16)
    assert report["points"] == rows() and report["sampling"]["guidance_scale"] == 1.0
