"""How runs of dit-bench come out: parity with its distances, faults, and what is kept of a run."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import QUICK
from tiny import tiny_dit, tiny_engine

from dit_bench import cli, measure
from dit_bench.contenders import Cast, needed_weights
from dit_bench.forwards import Networks, Work
from dit_bench.inputs import read_report
from dit_bench.options import build_parser, plan_of
from dit_bench.outputs import write_json
from dit_bench.progress import Progress
from dit_bench.quality import features
from dit_bench.quality.features import Extracted, FeatureNetwork
from dit_bench.quality.frechet import frechet_distance, moments_of
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
    monkeypatch.setattr(features, "load_network", lambda *_: NETWORK)
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3)).astype(np.uint8)
    np.savez(tmp_path / "set.npz", images)
    options = ["--only", "forward", "--precision", "bf16", "--parity", "--samples", "6",
               "--features", "lite0", "--reference-set", str(tmp_path / "set.npz"),
               "--resamples", "20"]  # fmt: skip
    report = run(model, *options, path=tmp_path / "a.json")
    (found,) = report["parity"]
    (row,) = found["subjects"]
    sets = row["sets"]
    assert (sets["metric"], sets["n"], sets["n_reference"], sets["resamples"]) == (
        "FD-Lite0", 6, 9, 20,
    )  # fmt: skip
    assert sets["features"] == {"features": "lite0"}
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


@pytest.mark.parametrize(
    ("precision", "damage", "error"),
    [
        ("fp32", lambda images: torch.zeros_like(images), None),
        ("bf16", lambda images: torch.zeros_like(images), None),
        ("int8", lambda images: torch.zeros_like(images), None),
        ("fp32", lambda images: images * torch.nan, None),
        ("fp32", lambda images: images + 0.01 * (images - 0.5), 0.01),
    ],
)
def test_a_whole_generation_is_checked_by_what_it_returns(
    precision: str,
    damage: Any,
    error: float | None,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = Engine.generate
    options = ["--only", "image", "--precision", precision]
    report = run(model, *options, path=tmp_path / "a.json")
    (row,) = report["measurements"]
    assert row["status"] == "ok" and row["error"] <= row["bound"] <= 0.5

    def damaged(self: Engine, *arguments: Any, backend: str, **options: Any) -> Any:
        found = honest(self, *arguments, backend=backend, **options)
        return replace(found, images=damage(found.images)) if backend == "lean" else found

    monkeypatch.setattr(Engine, "generate", damaged)
    report = run(model, *options, path=tmp_path / "a.json", code=1)
    (row,) = report["measurements"]
    assert row["status"] == "wrong" and "ms" not in row
    if error is not None:
        assert row["error"] == pytest.approx(error, rel=0.01)


def test_eager_bfloat16_is_generated_once_for_all_contenders(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    honest = Engine.generate

    def counted(self: Engine, labels: Any, **options: Any) -> Any:
        made.append((options["backend"], options["precision"], len(labels)))
        return honest(self, labels, **options)

    monkeypatch.setattr(Engine, "generate", counted)
    options = [
        "--only",
        "image",
        "--precision",
        "bf16",
        "--peers",
        "lean/int8",
        "--batch",
        "1",
        "2",
    ]
    run(model, *options, path=tmp_path / "a.json")
    assert [each for each in made if each[0] == "eager"] == [
        ("eager", "bf16", 1), ("eager", "bf16", 2),
    ]  # fmt: skip


def test_a_reference_is_read_within_the_run(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under its limit of threads, as quiet as it is, and before anything is measured."""
    monkeypatch.setattr(features, "load_network", lambda *_: NETWORK)
    np.savez(tmp_path / "set.npz", np.zeros((9, 4, 4, 3), np.uint8))
    arguments = ["--model", model, "--parity", "--samples", "6", "--features", "lite0",
                 "--reference-set", str(tmp_path / "set.npz"), "--quiet", *QUICK]  # fmt: skip
    seen = []

    def read(*_: Any, quiet: bool, check: Any, **__: Any) -> Any:
        seen.append((quiet, torch.get_num_threads(), check.__self__.__class__))
        raise KeyboardInterrupt

    monkeypatch.setattr(features.SetFeatures, "read", read)
    monkeypatch.setattr(measure, "measure_ceilings", lambda *_, **__: pytest.fail("measured"))
    plan = plan_of(build_parser("").parse_args(arguments))
    assert seen == [] and plan.sets is not None and plan.sets.reference is not None
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert cli.main(arguments) == 130
    finally:
        torch.set_num_threads(threads)
    assert seen == [(True, 1, Progress)]


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
        ("--scaling", {"metric": "FD", "points": [1]}, "is not a report of dit-bench"),
        ("--operators", {"operators": {}, "ceilings": {}}, "'operators' is dict, not list"),
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


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_what_is_measured_is_kept_while_a_run_goes_on(
    sent: signal.Signals,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Beside the final name; a signal then gives the file its name, and one line."""
    honest = Work.guided_step
    path = tmp_path / "a.json"
    seen: list[dict[str, Any]] = []

    def interrupted(self: Work, name: str, precision: str) -> Any:
        if not seen:
            assert not path.exists()
            seen.append(read_report(tmp_path / "a.json.partial"))
            os.kill(os.getpid(), sent)
        return honest(self, name, precision)

    monkeypatch.setattr(Work, "guided_step", interrupted)
    report = run(model, path=path, code=130)
    assert [row["what"] for row in seen[0]["measurements"]] == ["forward"]
    assert seen[0]["interrupted"] and report["interrupted"]
    assert [row["what"] for row in report["measurements"]] == ["forward", "step"]
    assert not (tmp_path / "a.json.partial").exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"interrupted: what was measured until then is in {path}"


def test_a_plot_that_draws_nothing_says_why_and_makes_no_directory(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "figures"
    run(model, "--only", "decode", "--plot", str(folder), path=tmp_path / "a.json")
    assert not folder.exists()
    notes = [line for line in capsys.readouterr().err.splitlines() if "figures" in line]
    assert len(notes) == 1 and "no times of forwards" in notes[0]


@pytest.mark.parametrize("option", ["--compare", "--load", "--scaling", "--operators"])
def test_a_file_that_is_not_there_is_told_without_an_errno(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, said in ((tmp_path / "no.json", "does not exist"), (tmp_path, "is a directory")):
        models = [] if option == "--load" else ["--model", "S/2"]
        assert cli.main([*models, option, str(path)]) == 2
        error = capsys.readouterr().err
        assert error == f"error: {path} {said}; a JSON file is needed\n"


def test_long_rounds_do_not_overshoot_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only rounds move: at most twice the seconds, but for one round."""
    now = 0.0
    monkeypatch.setattr("dit_bench.progress.time.perf_counter", lambda: now)
    for each, wanted in ((0.1, 100), (1.0, 10), (3.0, 5), (4.0, 5), (6.0, 3), (15.0, 1)):
        with Progress(quiet=True).rounds(1000, "a part", 10.0) as go_on:
            done = 0
            while True:
                now += each
                done += 1
                if not go_on():
                    break
        assert abs(done - wanted) <= (each == 0.1) and each * done <= max(20.0, each), each
