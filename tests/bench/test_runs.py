"""How runs of dit-bench come out: parity with its distances, faults, and what is kept of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import QUICK
from tiny import tiny_dit, tiny_engine

from dit_bench import cli, measure, parity
from dit_bench.contenders import Cast, needed_weights
from dit_bench.features import Extracted, FeatureNetwork
from dit_bench.forwards import Networks, Work
from dit_bench.frechet import frechet_distance, moments_of
from dit_bench.inputs import read_report
from dit_bench.outputs import write_json
from dit_bench.progress import Progress
from dit_bench.subjects import in_numerics
from dit_engine.engine import Engine

pytestmark = pytest.mark.usefixtures("small_ceilings")


def colours(images: np.ndarray) -> Extracted:
    return Extracted((images.astype(np.float32) / 255).mean(axis=(1, 2)))


NETWORK = FeatureNetwork("lite0", "FD-Lite0", 3, colours, record={"features": "lite0"})


def run(model: str, *options: str, path: Path, code: int = 0) -> dict[str, Any]:
    assert cli.main(["--model", model, "--json", str(path), *QUICK, *options]) == code
    return read_report(path)


def test_parity_gives_distances_with_n_and_their_interval(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parity, "load_network", lambda *_: NETWORK)
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3)).astype(np.uint8)
    np.savez(tmp_path / "set.npz", images)
    options = ["--only", "forward", "--precision", "bf16", "--parity", "--samples", "6",
               "--features", "lite0", "--reference-set", str(tmp_path / "set.npz"),
               "--resamples", "5"]  # fmt: skip
    report = run(model, *options, path=tmp_path / "a.json")
    (found,) = report["parity"]
    (row,) = found["subjects"]
    sets = row["sets"]
    assert (sets["metric"], sets["n"], sets["n_reference"], sets["resamples"]) == (
        "FD-Lite0", 6, 9, 5,
    )  # fmt: skip
    assert found["features"] == {"features": "lite0"}
    made = Engine.from_pretrained(model, device="cpu").generate(
        list(range(6)), seed=0, steps=2, backend="eager", output="np"
    )
    expected = frechet_distance(
        moments_of(colours(made.images).pooled), moments_of(colours(images).pooled)
    )
    assert sets["eager_to_reference"] == pytest.approx(expected, rel=1e-3)
    delta = sets["absolute_difference"]
    assert delta["value"] == abs(sets["to_reference"] - sets["eager_to_reference"])
    assert delta["low"] <= delta["value"] <= delta["high"]
    shown = capsys.readouterr().out
    for text in ("FD-Lite0", "|Δ|", f"{delta['value']:.3g}", f"to {delta['high']:.3g} (95%)"):
        assert text in shown, text
    assert "FID" not in shown


def damage(monkeypatch: pytest.MonkeyPatch, name: str, of: Any) -> None:
    """What method ``name`` of `Work` gives for ``of`` (its first argument) is 1 % too large."""
    honest = getattr(Work, name)

    def damaged(self: Any, first: Any, precision: str) -> Any:
        function = honest(self, first, precision)
        return (lambda: function() * 1.01) if first == of else function

    monkeypatch.setattr(Work, name, damaged)


@pytest.mark.parametrize(("method", "of"), [("guided_step", "lean"), ("decode", True)])
def test_a_whole_generation_is_checked_by_its_step_and_its_decoder(
    method: str, of: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(monkeypatch, method, of)
    report = run(model, "--only", "image", path=tmp_path / "a.json", code=1)
    (row,) = report["measurements"]
    assert row["status"] == "wrong" and "ms" not in row
    assert row["error"] == pytest.approx(0.01 / 2**0.5, rel=0.02)  # one of two parts is 1 % off


def test_what_was_measured_before_an_error_is_kept(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no weights")
    options = ["--model", model, str(bad), "--only", "forward"]
    report = run(model, *options, path=tmp_path / "a.json", code=2)
    assert [row["what"] for row in report["measurements"]] == ["forward"]
    assert report["interrupted"] and "bad.safetensors" in report["failure"]
    shown = capsys.readouterr()
    assert "INTERRUPTED" in shown.out and "bad.safetensors" in shown.out
    last = shown.err.splitlines()[-1]
    assert last.startswith("error: ") and "bad.safetensors" in last


def test_a_subject_that_cannot_run_is_an_error(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Any, name: str, precision: str) -> Any:
        raise RuntimeError("no room for it")

    monkeypatch.setattr(Work, "backend", broken)
    report = run(model, "--only", "forward", "--peers", "eager", path=tmp_path / "a.json", code=2)
    assert [row["status"] for row in report["measurements"]] == ["skipped", "ok"]
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: lean fp32 did not run (") and "no room for it" in error


def test_pictures_keep_the_models_own_numerics_beside_diffusers(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    options = ["--only", "forward", "--peers", "diffusers", "--parity", "--samples", "2"]
    report = run(model, *options, path=tmp_path / "a.json")
    assert [row["status"] for row in report["measurements"]] == ["ok", "ok"]
    assert report["models"][0]["config"]["numerics"] == "diffusers"
    assert report["parity"][0]["settings"]["numerics"] == "official"
    assert "measured with numerics 'diffusers'" in capsys.readouterr().out


@torch.inference_mode()
def test_a_model_in_other_numerics_is_another_function_of_the_same_tensors() -> None:
    own = tiny_dit()
    twin = in_numerics(own, "diffusers")
    assert in_numerics(own, "official") is own
    assert twin.pos_embed.data_ptr() == own.pos_embed.data_ptr()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([500, 900]), torch.tensor([1, 2])
    expected = tiny_dit(numerics="diffusers", mlp_norm_eps=1e-5)(x, t, y)
    assert torch.equal(twin(x, t, y), expected) and not torch.allclose(own(x, t, y), expected)


def test_engines_are_kept_for_sheets_only(model: str) -> None:
    plan = measure.Plan((model,), ("lean", "fp32"), torch.device("cpu"), rounds=1, seconds=0.1,
                        kinds=("forward",))  # fmt: skip

    def kept(plan: measure.Plan) -> int:
        report: dict[str, Any] = {"models": [], "measurements": [], "parity": []}
        return len(measure.measure(plan, report, Progress(quiet=True)))

    assert kept(plan) == 0
    assert kept(measure.replace(plan, keep_engines=True)) == 1


def test_weights_that_every_forward_reads() -> None:
    model = tiny_dit()
    hoisted = ("t_embedder", "y_embedder")
    read = sum(
        p.numel()
        for name, p in model.named_parameters()
        if not name.startswith(hoisted) and "adaLN_modulation" not in name
    )
    assert needed_weights(model.config) == read


def test_the_subject_comes_first_also_where_a_peer_decodes_alike() -> None:
    networks = Networks(tiny_engine())
    peers = [("eager", "bf16"), ("lean", "bf16")]
    cast = Cast(networks, ("lean", "int8"), peers, 1000)
    found = cast.decode(Work(networks, 1), 5)
    assert [(c.name, c.role) for c in found] == [("lean bf16", "subject"), ("eager bf16", "peer")]


def test_ctrl_c_is_heard_between_the_steps_of_parity(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    honest = Progress.check

    def pressed(self: Progress) -> None:
        nonlocal steps
        steps += 1
        self.interrupted |= steps > 20
        honest(self)

    monkeypatch.setattr(Progress, "check", pressed)
    options = ["--only", "forward", "--parity", "--samples", "2", "--steps", "1000"]
    report = run(model, *QUICK, *options, path=tmp_path / "a.json", code=130)
    assert report["interrupted"] and report["parity"] == [] and steps == 21
    assert len(report["measurements"]) == 1


def test_json_has_neither_nan_nor_infinity(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    inf, nan = float("inf"), float("nan")
    write_json({"a": [inf, 1.5, (nan,)], "b": {"c": -inf, "d": "NaN"}}, tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=refuse)
    assert found == {"a": [None, 1.5, [None]], "b": {"c": None, "d": "NaN"}}


@pytest.mark.parametrize(
    ("option", "content", "said"),
    [
        ("--scaling", {"metric": "FD", "points": [1]}, "'points' is no list of objects"),
        ("--operators", {"operators": {}, "ceilings": {}}, "'operators' is no list of objects"),
        ("--operators", {"operators": [{"status": "ok", "rate": 1}], "ceilings": {}},
         "operators[0] has no 'operator'"),
        ("--compare", [], "a report is a JSON object"),
    ],
)  # fmt: skip
def test_files_of_other_shapes_are_refused_in_one_line(
    option: str, content: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert cli.main(["--model", "S/2", option, str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error and "other.json" in error and error.count("\n") == 1
