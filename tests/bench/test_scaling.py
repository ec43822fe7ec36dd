"""The scaling study end to end on a small run: equal conditions, resumption, the figure."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_engine

from dit_bench.cost import dit_cost, total
from dit_bench.report import new_report, validate
from dit_engine.engine import Engine
from dit_engine.io.files import save_tensors

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "studies"))
scaling = import_module("scaling")
folder, networks, sample = scaling.folder, scaling.networks, scaling.sample


def test_the_networks_cost_what_they_are_compared_for() -> None:
    made = {name: make() for name, make in networks(4, 16, 16).items()}
    macs = {name: scaling.macs_of(network, 16) for name, network in made.items()}
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
    assert scaling.main([*arguments, "--only", "DiT small/4", "U-Net"]) == 0
    for name in ("DiT small/4", "U-Net"):
        half, whole = (load_file(out / folder(name) / f"ema-00000{k}.safetensors") for k in (1, 2))
        assert any(not torch.equal(half[key], whole[key]) for key in half)
    assert not (out / "dit-large-2").exists()
    assert scaling.main([*arguments, "--only", "DiT huge/2"]) == 2
    assert "network 'DiT huge/2' is unknown; choose among DiT small/4" in capsys.readouterr().err
    assert scaling.main(["train", "--run", "nowhere", "-o", str(out)]) == 2
    assert "--run is a directory of dit-train" in capsys.readouterr().err


def rows(distances: tuple[float, ...] = (90.0, 70.0, 60.0, 65.0)) -> list[dict[str, Any]]:
    costs = {"DiT small/4": 0.01, "DiT small/2": 0.05, "DiT large/2": 0.2, "U-Net": 0.2}
    return [
        {"section": "scaling", "case": name, "contender": "10 steps", "status": "ok",
         "steps": 10, "gmacs": gmacs, "distance": distance, "n": 10}
        for (name, gmacs), distance in zip(costs.items(), distances, strict=True)
    ]  # fmt: skip


def test_the_claim_is_of_the_dits_in_the_order_of_their_cost() -> None:
    assert scaling.falls(rows()[::-1], 10)
    assert not scaling.falls(rows((90.0, 50.0, 60.0, 10.0)), 10)


def test_what_was_measured_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out, path = tmp_path / "run", tmp_path / "out", tmp_path / "all.json"
    out.mkdir()
    kept = new_report("scaling", scaling.describe(torch.device("cpu")), {})
    kept["rows"] = [row | {"steps": steps} for row in rows() for steps in (5, 10)]
    kept["rows"] = [row for row in kept["rows"] if row["case"] != "U-Net"]
    (out / "measured.json").write_text(json.dumps(kept))
    monkeypatch.setattr(Engine, "from_pretrained", lambda _: tiny_engine())
    monkeypatch.setattr(scaling, "load_network", lambda _: None)
    monkeypatch.setattr(scaling, "load_halves", lambda *_: None)
    monkeypatch.setattr(scaling, "measured", lambda *_: {"gmacs": 1.0, "distance": 3.0, "n": 10})
    arguments = ["measure", "--run", str(run), "-o", str(out), "--steps", "10", "--samples", "10",
                 "--json", str(path), "--plot", str(tmp_path / "a.png")]  # fmt: skip
    assert scaling.main(arguments) == 2
    assert "ema-000005.safetensors does not exist: train 'DiT small/4'" in capsys.readouterr().err
    for name in networks(4, 8, 10):
        (out / folder(name)).mkdir()
        for steps in (5, 10):
            (out / folder(name) / f"ema-{steps:06d}.safetensors").touch()
    assert scaling.main(arguments) == 0
    report = json.loads(path.read_text())
    validate(report)
    again = [row for row in report["rows"] if row["distance"] == 3.0]
    names = {"DiT large/4", "U-Net"}
    assert {(row["case"], row["steps"]) for row in again} == {
        (n, k) for n in names for k in (5, 10)
    }
    assert len(report["rows"]) == 10 and report["settings"]["guidance_scale"] == 1.0
    assert "10 steps: more Gflops" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
