"""dit-bench on tiny models: its report, its files, its errors, its interruption."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
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
from dit_bench.quality import paired
from dit_bench.quality.features import Extracted, FeatureNetwork
from dit_bench.report import VERSION, WORK, read
from dit_bench.speed import models
from dit_bench.speed.forward import Work
from dit_engine.engine import Engine
from dit_kernels.cpu import operators as native

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
    code = cli.main(["--model", model, "--backend", "lean", "--precision", "bf16", "--batch", "1",
                     "2", "--peers", "eager,eager/fp32", "--parity", "--samples", "2", *QUICK,
                     *options])  # fmt: skip
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
    assert (paired_row["n"], paired_row["contender"]) == (2, "lean bf16")
    assert 0 < paired_row["final_latent_error"]["mean"] < 0.1


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
        ceiling = report["ceilings"]["matmul_tflop_s"][row["precision"]]
        assert row["percent_of_matmul"] == pytest.approx(100 * row["tflop_s"] / ceiling)
    forward = rows_of(report, section="forward", images=1)[0]
    read_parts = (
        "patch_embed",
        "attention",
        "mlp",
        "final",
    )  # by those that hoist the conditioning
    weights = 2 * sum(cost["cost"]["parts"][part]["parameters"] for part in read_parts)
    assert forward["flops_per_byte"] == pytest.approx(2 * macs / weights)
    moved = weights / forward["ms"]["median"] / 1e6
    copy = report["ceilings"]["copy_gb_s"]
    assert forward["percent_of_copy"] == pytest.approx(100 * moved / copy)


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


def test_a_subject_that_computes_another_function_is_not_timed(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Work.forward

    def damaged(self: Work, name: str, precision: str) -> Any:
        function = honest(self, name, precision)
        return (lambda: function() * 1.01) if name == "lean" else function

    monkeypatch.setattr(Work, "forward", damaged)
    report = run(model, "--only", "forward", path=tmp_path / "a.json", code=1)
    (row,) = report["rows"]
    assert row["status"] == "wrong" and "another function" in row["reason"] and "ms" not in row
    assert row["error"] == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize(
    ("precision", "damage"),
    [
        ("fp32", lambda images: torch.zeros_like(images)),
        ("bf16", lambda images: torch.zeros_like(images)),
        ("fp32", lambda images: images * torch.nan),
        ("fp32", lambda images: images + 0.01 * (images - 0.5)),
    ],
)
def test_a_whole_generation_is_checked_by_what_it_returns(
    precision: str, damage: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Engine.generate
    made: list[tuple[str, str]] = []

    def damaged(self: Engine, *arguments: Any, backend: str, **options: Any) -> Any:
        made.append((backend, options["precision"]))
        found = honest(self, *arguments, backend=backend, **options)
        return replace(found, images=damage(found.images)) if backend == "lean" else found

    monkeypatch.setattr(Engine, "generate", damaged)
    options = ["--only", "image", "--precision", precision, "--peers", "lean/int8"]
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


def test_a_subject_that_cannot_run_is_an_error(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = Work.forward

    def broken(self: Work, name: str, precision: str) -> Any:
        if name == "lean":
            raise RuntimeError("no room for it")
        return honest(self, name, precision)

    monkeypatch.setattr(Work, "forward", broken)
    report = run(model, "--only", "forward", "--peers", "eager", path=tmp_path / "a.json", code=2)
    assert [row["status"] for row in report["rows"]] == ["skipped", "ok"]
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: lean fp32 did not run (") and "no room for it" in error


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


def colours(images: np.ndarray) -> Extracted:
    return Extracted((images.astype(np.float32) / 255).mean(axis=(1, 2)))


NETWORK = FeatureNetwork("lite0", "FD-Lite0", 3, colours, record={"features": "lite0"})


def test_a_reference_is_read_within_the_run(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under its limit of threads, as quiet as it is, and before anything is measured."""
    monkeypatch.setattr("dit_bench.quality.features.load_network", lambda *_: NETWORK)
    np.savez(tmp_path / "set.npz", np.zeros((9, 4, 4, 3), np.uint8))
    arguments = ["--model", model, "--parity", "--samples", "6", "--features", "lite0",
                 "--reference-set", str(tmp_path / "set.npz"), "--quiet", *QUICK]  # fmt: skip
    seen = []

    def read_set(_: Any, quiet: bool, check: Any) -> Any:
        seen.append((quiet, torch.get_num_threads(), check.__self__.__class__))
        raise KeyboardInterrupt

    monkeypatch.setattr(paired.SetComparison, "with_moments", read_set)
    monkeypatch.setattr(models, "measure_ceilings", lambda *_, **__: pytest.fail("measured"))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert cli.main(arguments) == 130
    finally:
        torch.set_num_threads(threads)
    assert seen == [(True, 1, Progress)]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_what_is_measured_is_kept_while_a_run_goes_on(
    sent: signal.Signals,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Beside the final name. A signal ends the run after the guided step that is being timed."""
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


def test_engines_are_kept_for_sheets_only(model: str) -> None:
    plan = models.Plan((model,), ("lean", "fp32"), torch.device("cpu"), rounds=1, seconds=0.1,
                       kinds=("forward",))  # fmt: skip
    for keeps in (False, True):
        report: Report = {"rows": []}
        found = models.measure(replace(plan, keep_engines=keeps), report, Progress(quiet=True))
        assert len(found) == keeps


def test_a_plot_that_draws_nothing_says_why_and_makes_no_directory(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "figures"
    run(model, "--only", "decode", "--plot", str(folder), path=tmp_path / "a.json")
    assert not folder.exists()
    notes = [line for line in capsys.readouterr().err.splitlines() if "figures" in line]
    assert len(notes) == 1 and "no times of forwards" in notes[0]


@pytest.mark.parametrize(
    ("option", "content", "said"),
    [
        ("--scaling", made_up.report(), "kind 'models' is not one of scaling"),
        ("--operators", made_up.report(), "kind 'models' is not one of operators"),
        ("--compare", [], "a report is a JSON object"),
        ("--load", {"schema": "dit-bench/2"}, "'dit-bench/2' is not 'dit-bench/3'; measure again"),
    ],
)
def test_files_that_are_not_there_or_of_other_shapes_are_refused_in_one_line(
    option: str, content: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, models_given = tmp_path / "a.json", [] if option == "--load" else ["--model", "S/2"]
    for place, missing in ((path, "does not exist"), (tmp_path, "is a directory")):
        assert cli.main([*models_given, option, str(place)]) == 2
        assert f"{place} {missing}; a JSON file is needed" in capsys.readouterr().err
    path.write_text(json.dumps(content), encoding="utf-8")
    assert cli.main([*models_given, option, str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error and "a.json" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--model is missing"),
        (["--model", "huge"], "model 'huge' is unknown; choose builtin, one of DiT-S/2"),
        (["--model", "XXL/2"], "model 'XXL/2' is unknown; choose one of DiT-S/2"),
        (["--model", "S/2", "--backend", "fast"], "backend 'fast' is unknown; choose one of auto"),
        (["--model", "S/2", "--peers", "x"], "peer 'x' is unknown; choose among diffusers, open"),
        (["--model", "S/2", "--peers", "eager/fp1"], "precision 'fp1' is none of fp32"),
        (["--model", "S/2", "--precision", "fp1"], "precision 'fp1': choose one of fp32"),
        (["--model", "builtin", "--size", "512"], "--size is for published models"),
        (["--model", "S/2", "--vae", "x"], "--vae is for checkpoints"),
        (["--model", "S/2", "--steps", "1001"], "steps 1001 is out of range"),
        (["--model", "S/2", "--sampler", "euler"], "sampler 'euler': choose one of ddpm"),
        (["--model", "S/2", "--seconds", "0"], "seconds 0.0 is not a finite number above 0"),
        (["--model", "S/2", "--seconds", "inf"], "seconds inf is not a finite number above 0"),
        (["--model", "S/2", "--features", "lite0"], "--features is for --parity, which is not"),
        (["--model", "S/2", "--resamples", "0"], "--resamples is for --parity, which is not"),
        (["--model", "S/2", "--allow-few"], "--allow-few is for --parity, which is not given"),
        (["--model", "S/2", "--parity", "--allow-few"], "--allow-few is for --features or --ref"),
        (
            ["--model", "S/2", "--parity", "--reference-set", "x", "--inception-weights", "no.pth"],
            "Inception-v3 weights no.pth are not a file",
        ),
        (["--model", "S/2", "--load", "x"], "--load shows a finished report; --model has no"),
        (["--model", "S/2", "--threads", "4096"], "threads 4096 is above"),
        (["--model", "S/2", "--device", "tpu"], "device 'tpu' is not available"),
        (["--model", "S/2", "--json", "no/such/a.json"], "no/such does not exist"),
        (["--model", "S/2", "--json", "--csv"], "cannot both go to standard output"),
        (["--model", "S/2", "--json", "--html", "-"], "cannot both go to standard output"),
        (["--model", "S/2", "--json", "a", "--csv", "a"], "cannot both go to a: name another"),
        (["--model", "S/2", "--plot", f"{__file__}/plots"], "a directory is needed"),
        (["--model", "S/2", "--plot", __file__], "is a file; --plot needs a directory"),
        (["--model", "S/2", "--strict"], "--strict is for --compare, which is not given"),
        (["--model", "S/2", "--backend", "eager", "--precision", "int8"], "'int8' is for backend"),
        (["measure"], "command 'measure' is unknown; choose one of cpu, gpu, operators"),
        (["cpu", "--threads", "100000"], "threads 100000 is above the"),
        (["cpu", "--profile", "--only", "vae"], "--profile vae: choose one of XL/2, S/2, builtin"),
        (["cpu", "--busy", "1", "--only", "XL/2"], "--busy XL/2: choose one of builtin, S/2"),
        (["cpu", "--json", "/no/such/folder/x.json"], "/no/such/folder does not exist"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(options) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown.err
    assert said in shown.err and shown.out == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch", "0"], "'0' is not a positive integer"),
        (["--size", "300"], "invalid choice: 300"),
        (["--only", "x"], "invalid choice: 'x'"),
        (["cpu", "--rounds", "many"], "'many' is not a positive integer"),
        (["cpu", "--only", "L/2"], "invalid choice: 'L/2'"),
        (["cpu", "--quack"], "unrecognized arguments: --quack"),
        (["cpu", "--profile", "--busy", "1"], "not allowed with argument --profile"),
    ],
)
def test_options_out_of_range_are_code_2(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(options)
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and error.count("\n") == 1


def test_what_cannot_work_ends_in_one_line_before_a_model_is_made(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options are looked at before what is installed."""
    monkeypatch.setattr(models, "load_subject", lambda *_, **__: pytest.fail("made a model"))
    if not torch.cuda.is_available():  # else TensorRT may be here
        assert cli.main(["--model", "XL/2", "--backend", "trt"]) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and shown.out == ""
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(["--model", "S/2", "--steps", "1001"]) == 2
    assert "error: steps 1001 is out of range" in capsys.readouterr().err
    assert cli.main(["--model", "S/2"]) == 2
    assert capsys.readouterr().err.startswith("error: rich is not installed: pip install")
    # A backend without its kernels is no part of another error.
    monkeypatch.setattr(native, "why_not", lambda: "not built here")
    options = ["--model", "S/2", "--backend", "lean", "--parity", "--reference-set", "x"]
    assert cli.main([*options, "--inception-weights", "no.pth"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: Inception-v3 weights no.pth ") and error.count("\n") == 1


def test_env_tells_the_machine_and_which_backends_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]["cpu_count"] == os.cpu_count()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert float(found["hardware"]["memory"].split()[0]) == pytest.approx(pages, rel=0.05)
    backends = found["backends"]
    assert backends["eager"] == backends["compile"] == "yes"
    assert {"lean", "onnxruntime", "tensorrt"} <= backends.keys()
    if not torch.cuda.is_available():
        assert backends["tensorrt"] != "yes"
    assert cli.main(["--env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.split()[-1] == torch.__version__ for line in lines) == 1
