"""dit-bench on tiny models: its report, its files, its errors, its interruption."""

from __future__ import annotations

import csv
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up
import numpy as np
import pytest
import torch
from made_up import QUICK

from dit_bench import cli
from dit_bench.outputs import CSV_COLUMNS
from dit_bench.progress import Progress
from dit_bench.report import VERSION, WORK, read
from dit_bench.speed import models
from dit_bench.speed.forward import Work
from dit_engine.engine import Engine

pytestmark = pytest.mark.usefixtures("small_ceilings")
Report = dict[str, Any]


def run(model: str, *options: str, path: Path, code: int = 0) -> Report:
    assert cli.main(["--model", model, "--json", str(path), *QUICK, *options]) == code
    return read(path)


def rows_of(report: Report, **wanted: Any) -> list[dict[str, Any]]:
    return [r for r in report["rows"] if wanted.items() <= r.items()]


@pytest.fixture(scope="module")
def finished(
    model: str, small_ceilings: None, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A whole run's report, with what it wrote: "json", "csv", "html", "plot"."""
    folder = tmp_path_factory.mktemp("run")
    paths = {"json": folder / "a.json", "csv": folder / "a.csv", "html": folder / "a.html",
             "plot": folder / "plots"}  # fmt: skip
    options = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
    np.savez(folder / "set.npz", np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), np.uint8))
    options += ["--features", "inception", "--reference-set", str(folder / "set.npz")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dit_bench.quality.features.load_network", lambda *_: made_up.COLOURS)
        code = cli.main(["--model", model, "--backend", "lean", "--precision", "bf16", "--batch",
                         "1", "2", "--peers", "eager,eager/fp32", "--parity", "--samples", "6",
                         *QUICK, *options])  # fmt: skip
    assert code == 0
    return {"report": read(paths["json"]), **paths}


def test_every_part_is_measured_for_everyone(finished: dict[str, Any], model: str) -> None:
    report = finished["report"]
    assert report["schema"] == VERSION and report["complete"]
    for images in (1, 2):
        for section in WORK:
            rows = rows_of(report, section=section, images=images)
            assert [row["contender"] for row in rows] == ["lean bf16", "eager bf16", "eager fp32"]
            assert all(row["status"] == "ok" and row["model"] == Path(model).name for row in rows)
            assert [row["role"] for row in rows] == ["subject", "peer", "peer"]
            assert all(row["error"] <= row["bound"] for row in rows)
            assert "ratio" not in rows[0] and all("verdict" in row for row in rows[1:])
    (paired_row,) = rows_of(report, section="parity")
    assert (paired_row["n"], paired_row["contender"]) == (6, "lean bf16")
    assert 0 < paired_row["final_latent_error"]["mean"] < 0.1
    assert paired_row["sets"]["n_reference"] == 9


def test_rates_follow_from_times_and_costs(finished: dict[str, Any]) -> None:
    report = finished["report"]
    (cost,) = report["models"]
    macs, decode, steps = cost["cost"]["total"]["macs"], cost["decoder"]["macs"], 2
    work = {"forward": macs, "step": 2 * macs, "decode": decode, "image": 2 * steps * macs + decode}
    for row in report["rows"]:
        if row["section"] not in WORK:
            continue
        flops, ms = 2 * work[row["section"]] * row["images"], row["ms"]["median"]
        assert row["gflops"] == pytest.approx(flops / 1e9)
        assert row["tflop_s"] == pytest.approx(flops / ms / 1e9)
        assert row["images_s"] == pytest.approx(1000 * row["images"] / ms)
        assert row["ms"]["n"] == len(row["samples_ms"]) <= 3
    forward = rows_of(report, section="forward", images=1)[0]
    read_parts = ("patch_embed", "attention", "mlp", "final")  # the conditioning is hoisted
    weights = 2 * sum(cost["cost"]["parts"][part]["parameters"] for part in read_parts)
    assert forward["flops_per_byte"] == pytest.approx(2 * macs / weights)


def test_a_finished_run_is_shown_again_and_written_as_csv(
    finished: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with finished["csv"].open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    rows = finished["report"]["rows"]
    assert len(lines) == len(rows) and tuple(lines[0]) == CSV_COLUMNS
    for line, row in zip(lines, rows, strict=True):
        assert line["contender"] == row["contender"]
        assert "ms" not in row or float(line["median_ms"]) == row["ms"]["median"]
    assert "lean bf16" in finished["html"].read_text(encoding="utf-8")
    assert list(finished["plot"].glob("*.png"))
    path = str(finished["json"])
    assert cli.main(["--load", path, "--compare", path]) == 0
    shown = capsys.readouterr().out
    assert "eager bf16" in shown and "Cost of one image" in shown and "1.000" in shown
    row = rows_of(finished["report"], section="forward", images=2)[0]
    assert f"{row['ms']['median']:.4g}" in shown
    assert cli.main(["--load", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == VERSION  # and nothing else


@pytest.mark.parametrize(("wrong", "code"), [(True, 1), (False, 2)])
def test_a_subject_that_is_wrong_or_cannot_run_is_not_timed(
    wrong: bool, code: int, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    honest = Work.forward

    def damaged(self: Work, name: str, precision: str) -> Any:
        if name == "lean" and not wrong:
            raise RuntimeError("no room for it")
        function = honest(self, name, precision)
        return (lambda: function() * 1.01) if name == "lean" else function

    monkeypatch.setattr(Work, "forward", damaged)
    path = tmp_path / "a.json"
    row, peer = run(model, "--only", "forward", "--peers", "eager", path=path, code=code)["rows"]
    assert peer["status"] == "ok" and "ms" not in row
    error = capsys.readouterr().err
    if wrong:
        assert row["status"] == "wrong" and "another function" in row["reason"]
        assert row["error"] == pytest.approx(0.01, rel=0.01)
    else:
        assert row["status"] == "failed"
        assert row["reason"].startswith("RuntimeError: no room for it (test_cli_bench.py:")
        assert "error: lean fp32 did not run (" in error and "no room for it" in error


def test_a_whole_generation_is_checked_by_what_it_returns(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Engine.generate
    made: list[tuple[str, str]] = []

    def damaged(self: Engine, *arguments: Any, backend: str, **options: Any) -> Any:
        made.append((backend, options["precision"]))
        found = honest(self, *arguments, backend=backend, **options)
        return replace(found, images=found.images * (backend != "lean"))

    monkeypatch.setattr(Engine, "generate", damaged)
    options = ["--only", "image", "--precision", "bf16", "--peers", "lean/int8"]
    (row, _) = run(model, *options, path=tmp_path / "a.json", code=1)["rows"]
    assert row["status"] == "wrong" and "ms" not in row
    assert made.count(("eager", "bf16")) == 1  # for all contenders


def test_what_was_measured_before_an_error_is_kept(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no weights")
    options = ["--model", model, str(bad), "--only", "forward"]
    report = run(model, *options, path=tmp_path / "a.json", code=2)
    assert [row["section"] for row in report["rows"]] == ["forward"]
    assert not report["complete"] and "bad.safetensors" in report["failure"]
    shown = capsys.readouterr()
    assert "INTERRUPTED" in shown.out and "bad.safetensors" in shown.out
    last = shown.err.splitlines()[-1]
    assert last.startswith("error: ") and "bad.safetensors" in last


def test_pictures_keep_the_models_own_numerics_beside_diffusers(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    options = ["--only", "forward", "--peers", "diffusers", "--parity", "--samples", "2"]
    report = run(model, *options, path=tmp_path / "a.json")
    assert [row["status"] for row in report["rows"]] == ["ok"] * 3
    assert report["models"][0]["config"]["numerics"] == "diffusers"
    assert rows_of(report, section="parity")[0]["settings"]["numerics"] == "official"
    assert "measured with numerics 'diffusers'" in capsys.readouterr().out


def test_what_is_measured_is_kept_while_a_run_goes_on(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the final name. A signal ends the run after the guided step that is being timed."""
    sent = signal.SIGTERM
    honest, path, before = Work.guided_step, tmp_path / "a.json", signal.getsignal(sent)
    seen: list[Report] = []

    def interrupted(self: Work, name: str, precision: str) -> Any:
        if not seen:
            assert not path.exists()
            seen.append(read(tmp_path / "a.json.partial"))
            os.kill(os.getpid(), sent)
        return honest(self, name, precision)

    monkeypatch.setattr(Work, "guided_step", interrupted)
    report = run(model, path=path, code=130)
    assert [row["section"] for row in seen[0]["rows"]] == ["forward"]
    assert not seen[0]["complete"] and not report["complete"]
    assert [row["section"] for row in report["rows"]] == ["forward", "step"]
    assert report["rows"][1]["ms"]["n"] == 1
    assert not (tmp_path / "a.json.partial").exists()
    shown = capsys.readouterr()
    last = shown.err.splitlines()[-1]
    assert last == f"interrupted: what was measured until then is in {path}"
    assert "INTERRUPTED" in shown.out and signal.getsignal(sent) is before


def test_ctrl_c_is_heard_between_the_steps_of_parity_and_at_once_the_second_time(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Progress(quiet=True)
    with progress.run(1):
        os.kill(os.getpid(), signal.SIGINT)
        assert progress.interrupted  # and nothing was raised
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    steps, honest = 0, Progress.check

    def pressed(self: Progress) -> None:
        nonlocal steps
        steps += 1
        self.interrupted |= steps > 20
        honest(self)

    monkeypatch.setattr(Progress, "check", pressed)
    options = ["--only", "forward", "--parity", "--samples", "2", "--steps", "1000"]
    report = run(model, *QUICK, *options, path=tmp_path / "a.json", code=130)
    assert not report["complete"] and rows_of(report, section="parity") == [] and steps == 21


MODEL = ["--model", "S/2"]
SCALING = str(Path(__file__).parents[2] / "benchmarks/results/scaling.json")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--model is missing"),
        (["--model", "huge"], "model 'huge' is unknown; choose builtin, one of DiT-S/2"),
        ([*MODEL, "--peers", "x"], "peer 'x' is unknown; choose among diffusers, open"),
        ([*MODEL, "--precision", "fp1"], "precision 'fp1': choose one of fp32"),
        (["--model", "builtin", "--size", "512"], "--size is for published models"),
        ([*MODEL, "--steps", "1001"], "steps 1001 is out of range"),
        ([*MODEL, "--seconds", "inf"], "seconds inf is not a finite number above 0"),
        ([*MODEL, "--features", "lite0"], "--features is for --parity, which is not"),
        ([*MODEL, "--parity", "--allow-few"], "--allow-few is for --features or --ref"),
        ([*MODEL, "--load", SCALING], "--load shows a finished report"),
        ([*MODEL, "--operators", SCALING], "kind 'scaling' is not one of operators"),
        ([*MODEL, "--compare", __file__], "test_cli_bench.py is not a report of dit-bench: "),
        (["--load", "nowhere"], "nowhere does not exist; a JSON file is needed"),
        ([*MODEL, "--threads", "4096"], "threads 4096 is above"),
        ([*MODEL, "--json", "--csv"], "cannot both go to standard output"),
        ([*MODEL, "--plot", __file__], "is a file; --plot needs a directory"),
        ([*MODEL, "--strict"], "--strict is for --compare, which is not given"),
        ([*MODEL, "--backend", "eager", "--precision", "int8"], "'int8' is for backend"),
        (["measure"], "command 'measure' is unknown; choose one of cpu, gpu, operators"),
        (["cpu", "--profile", "--busy", "1"], "not allowed with argument --profile"),
        (["cpu", "--profile", "--only", "vae"], "--profile vae: choose one of XL/2, S/2, builtin"),
        (["--batch", "0"], "'0' is not a positive integer"),
    ],
)
def test_bad_input_is_one_line_and_code_2_before_a_model_is_made(
    options: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(models, "load_subject", lambda *_, **__: pytest.fail("made a model"))
    try:
        code = cli.main(options)
    except SystemExit as left:
        code = left.code
    shown = capsys.readouterr()
    assert code == 2 and said in shown.err and shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown.err


def test_env_tells_the_machine_and_which_backends_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]["cpu_count"] == os.cpu_count()
    backends = found["backends"]
    assert backends["eager"] == backends["compile"] == "yes"
    assert {"lean", "onnxruntime", "tensorrt"} <= backends.keys()
    if not torch.cuda.is_available():
        assert backends["tensorrt"] != "yes"
    assert cli.main(["--env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.split()[-1] == torch.__version__ for line in lines) == 1
