"""The scaling study end to end on a small run: equal conditions, images by seed, the figure."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_engine

from dit_bench.cost import dit_cost, total
from dit_bench.report import validate
from dit_engine.engine import Engine
from dit_engine.io.files import save_tensors

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "studies"))
scaling = import_module("scaling")
folder, networks, sample = scaling.folder, scaling.networks, scaling.sample


def test_the_networks_cost_what_they_are_compared_for() -> None:
    made = {name: make() for name, make in networks(4, 16, 16).items()}
    macs = {name: scaling.cost_of(network, 16).macs for name, network in made.items()}
    for name in ("DiT small/4", "DiT large/2"):
        # The formula leaves out nothing that is counted.
        assert macs[name] == pytest.approx(total(dit_cost(made[name].config)).macs, rel=1e-3)
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


def test_training_and_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "BATCH", 2)
    monkeypatch.setattr(scaling, "SIZES", {"small": (1, 32, 2)})
    latents = torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    run, out, path = tmp_path / "run", tmp_path / "out", tmp_path / "all.json"
    run.mkdir()
    tensors = {"means": latents, "deviations": torch.ones_like(latents),
               "labels": torch.arange(10)}  # fmt: skip
    save_tensors(tensors, run / "latents.safetensors")
    common = ["--run", str(run), "-o", str(out), "--steps", "2"]
    monkeypatch.setattr(Engine, "from_pretrained", lambda _: tiny_engine())
    measure = ["measure", *common, "--samples", "10", "--json", str(path), "--plot",
               str(tmp_path / "a.png")]  # fmt: skip
    assert scaling.main(measure) == 2
    assert "ema-000001.safetensors does not exist: train 'DiT small/4'" in capsys.readouterr().err
    assert scaling.main(["train", *common]) == 0
    for name in ("DiT small/4", "U-Net"):
        half, whole = (load_file(out / folder(name) / f"ema-00000{k}.safetensors") for k in (1, 2))
        assert any(not torch.equal(half[key], whole[key]) for key in half)
    monkeypatch.setattr(scaling, "load_network", lambda _: None)
    monkeypatch.setattr(scaling, "load_halves", lambda *_: None)
    monkeypatch.setattr(scaling, "measured", lambda *_: {"distance": 3.0, "n": 10})
    assert scaling.main(measure) == 0
    report = json.loads(path.read_text())
    validate(report)
    assert [(row["case"], row["steps"]) for row in report["rows"]] == [
        (name, steps) for name in networks(4, 8, 10) for steps in (1, 2)
    ]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
