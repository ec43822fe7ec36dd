"""dit-bench on tiny models: its report, its files, its errors, its interruption."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import QUICK
from tiny import NAMES, tiny_dit

from dit_bench import cli, measure
from dit_bench.contenders import known_peers, parse_peers
from dit_bench.inputs import read_report
from dit_bench.outputs import CSV_COLUMNS
from dit_bench.progress import Progress
from dit_bench.schema import VERSION
from dit_bench.subjects import load_subject
from dit_engine.config import ModelConfig
from dit_kernels.cpu import operators as native

pytestmark = pytest.mark.usefixtures("small_ceilings")


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
    return {"report": read_report(paths["json"]), **paths}


def rows_of(report: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [r for r in report["measurements"] if wanted.items() <= r.items()]


def test_every_part_is_measured_for_everyone(finished: dict[str, Any], model: str) -> None:
    report = finished["report"]
    assert report["schema"] == VERSION and not report["interrupted"]
    names = ["lean bf16", "eager bf16", "eager fp32"]
    for images in (1, 2):
        for what in ("forward", "step", "decode", "image"):
            rows = rows_of(report, what=what, images=images)
            assert [row["name"] for row in rows] == names, what
            assert all(row["status"] == "ok" and row["model"] == Path(model).name for row in rows)
            assert [row["role"] for row in rows] == ["subject", "peer", "peer"]
            assert all(row["error"] <= row["bound"] for row in rows)
            assert "ratio" not in rows[0] and all("verdict" in row for row in rows[1:])


def test_rates_follow_from_times_and_costs(finished: dict[str, Any]) -> None:
    report = finished["report"]
    macs = report["models"][0]["cost"]["total"]["macs"]
    decode = report["models"][0]["decoder"]["macs"]
    steps = report["settings"]["steps"]
    for images in (1, 2):
        work = {"forward": macs, "step": 2 * macs, "decode": decode,
                "image": 2 * steps * macs + decode}  # fmt: skip
        for what, each in work.items():
            for row in rows_of(report, what=what, images=images):
                flops = 2 * each * images
                ms, n = row["ms"]["median"], row["ms"]["n"]
                assert row["gflops"] == pytest.approx(flops / 1e9)
                assert row["tflop_s"] == pytest.approx(flops / ms / 1e9)
                assert row["images_s"] == pytest.approx(1000 * images / ms)
                assert n == len(row["samples_ms"]) <= 3
                ceiling = report["ceilings"]["matmul_tflop_s"][row["name"].split()[1]]
                assert row["percent_of_matmul"] == pytest.approx(100 * row["tflop_s"] / ceiling)
    forward = rows_of(report, what="forward", images=1)[0]
    parts = report["models"][0]["cost"]["parts"]
    read = ("patch_embed", "attention", "mlp", "final")  # by those that hoist the conditioning
    weights = 2 * sum(parts[part]["parameters"] for part in read)
    assert forward["flops_per_byte"] == pytest.approx(2 * macs / weights)
    moved = weights / forward["ms"]["median"] / 1e6
    assert forward["percent_of_copy"] == pytest.approx(
        100 * moved / report["ceilings"]["copy_gb_s"]
    )
    assert "peak_mib" in forward


def test_parity_is_of_the_subject(finished: dict[str, Any]) -> None:
    (found,) = finished["report"]["parity"]
    assert found["n"] == 2
    (row,) = found["subjects"]
    assert (row["backend"], row["precision"]) == ("lean", "bf16")
    assert 0 < row["final_latent_error"]["mean"] < 0.1


def test_csv_has_a_line_a_measurement(finished: dict[str, Any]) -> None:
    with finished["csv"].open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    rows = finished["report"]["measurements"]
    assert len(lines) == len(rows) and tuple(lines[0]) == CSV_COLUMNS
    for line, row in zip(lines, rows, strict=True):
        assert float(line["median_ms"]) == row["ms"]["median"] and line["name"] == row["name"]


def test_a_finished_report_is_shown_again(
    finished: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(finished["json"])
    assert cli.main(["--load", path, "--compare", path]) == 0
    shown = capsys.readouterr().out
    assert "eager bf16" in shown and "Cost of one image" in shown
    row = rows_of(finished["report"], what="forward", images=2)[0]
    assert f"{row['ms']['median']:.4g}" in shown
    assert "1.000" in shown  # its time over its own


def test_json_to_standard_output_is_all_there_is(
    finished: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--load", str(finished["json"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == VERSION


def test_a_regression_ends_with_code_1(
    finished: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = json.loads(finished["json"].read_text(encoding="utf-8")) | {"other_load": 0.0}
    for row in older["measurements"]:
        row["ms"] = {key: value if key == "n" else value / 4 for key, value in row["ms"].items()}
        row["noisy"] = False
        row["other_load"] = 0.0
    newer = json.loads(finished["json"].read_text(encoding="utf-8")) | {"other_load": 0.0}
    for row in newer["measurements"]:
        row |= {"noisy": False, "other_load": 0.0}
        middle = row["ms"]["median"]
        row["ms"] |= {"p5": 0.99 * middle, "p95": 1.01 * middle}
    for name, report in (("old", older), ("new", newer)):
        (tmp_path / name).write_text(json.dumps(report), encoding="utf-8")
    new, old = str(tmp_path / "new"), str(tmp_path / "old")
    assert cli.main(["--load", new, "--compare", old]) == 1
    assert "regression" in capsys.readouterr().out
    assert cli.main(["--load", old, "--compare", new, "--strict"]) == 0
    assert "quicker" in capsys.readouterr().out
    (tmp_path / "old").write_text(json.dumps(older | {"other_load": 0.5}), encoding="utf-8")
    assert cli.main(["--load", old, "--compare", new]) == 3  # a busy run can be no quicker
    assert cli.main(["--load", old, "--compare", new, "--strict"]) == 1
    assert "noisy" in capsys.readouterr().out


def test_a_subject_that_computes_another_function_is_not_timed(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = measure.Work.backend

    def damaged(self: Any, name: str, precision: str) -> Any:
        function = honest(self, name, precision)
        return lambda: function() * 1.01

    monkeypatch.setattr(measure.Work, "backend", damaged)
    path = tmp_path / "a.json"
    assert cli.main(["--model", model, "--only", "forward", "--json", str(path), *QUICK]) == 1
    (row,) = read_report(path)["measurements"]
    assert row["status"] == "wrong" and "another function" in row["reason"] and "ms" not in row
    assert row["error"] == pytest.approx(0.01, rel=0.01)


def test_ctrl_c_keeps_what_is_finished(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted while the guided step is being timed: the forward and that step are kept."""
    honest = measure.Work.guided_step

    def interrupted(self: Any, name: str, precision: str) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return honest(self, name, precision)

    monkeypatch.setattr(measure.Work, "guided_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    path = tmp_path / "a.json"
    # A second one raises: eager's own step is the first to be built.
    monkeypatch.setattr(Progress, "_interrupt", lambda self, *_: setattr(self, "interrupted", True))
    assert cli.main(["--model", model, "--json", str(path), *QUICK]) == 130
    report = read_report(path)
    assert report["interrupted"]
    assert [row["what"] for row in report["measurements"]] == ["forward", "step"]
    assert [row["ms"]["n"] for row in report["measurements"]][1] == 1
    assert "INTERRUPTED" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_ctrl_c_stops_at_once() -> None:
    progress = Progress(quiet=True)
    with progress.run(1):
        progress.check()
        os.kill(os.getpid(), signal.SIGINT)
        assert progress.interrupted  # and nothing was raised
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        progress.check()


def test_a_report_without_common_times_is_still_written(
    finished: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = json.loads(finished["json"].read_text(encoding="utf-8"))
    for row in other["measurements"]:
        row["model"] = "another"
    (tmp_path / "old").write_text(json.dumps(other), encoding="utf-8")
    options = ["--compare", str(tmp_path / "old"), "--csv", str(tmp_path / "new.csv")]
    assert cli.main(["--load", str(finished["json"]), *options]) == 2
    assert "old: the two reports have no measurement in common" in capsys.readouterr().err
    assert (tmp_path / "new.csv").exists()


@pytest.mark.parametrize("name", ["S/8", "DiT-S/8", "S-8"])
def test_a_published_size_has_random_weights(name: str) -> None:
    subject = load_subject(name, size=512, with_vae=False)
    assert (subject.name, subject.size, subject.trained) == ("S/8", 512, False)
    assert subject.model.config == ModelConfig.named("S/8", 512)
    assert all(bool((p != 0).any()) for p in subject.model.parameters())


def test_a_checkpoint_keeps_its_weights(model: str) -> None:
    subject = load_subject(model)
    assert subject.size == 16 and subject.trained and subject.label_names == NAMES
    assert torch.equal(subject.model.blocks[0].mlp.fc1.weight, tiny_dit().blocks[0].mlp.fc1.weight)
    with pytest.raises(ValueError, match="size 256 is for a published model"):
        load_subject(model, size=256)


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
        (["--model", "S/2", "--reference-set", "x"], "--reference-set is for --parity"),
        (["--model", "S/2", "--inception-weights", "x"], "--inception-weights is for --parity"),
        (["--model", "S/2", "--resamples", "100"], "--resamples is for --parity, which is not"),
        (["--model", "S/2", "--resamples", "0"], "--resamples is for --parity, which is not"),
        (["--model", "S/2", "--allow-few"], "--allow-few is for --parity, which is not given"),
        (["--model", "S/2", "--parity", "--allow-few"], "--allow-few is for --features or --ref"),
        (
            ["--model", "S/2", "--parity", "--reference-set", "x", "--inception-weights", "no.pth"],
            "Inception-v3 weights no.pth are not a file",
        ),
        (
            ["--model", "S/2", "--parity", "--features", "lite0", "--inception-weights", "x"],
            "--inception-weights x: --features lite0 reads none",
        ),
        (["--model", "S/2", "--load", "x"], "--load shows a finished report; --model has no"),
        (["--model", "S/2", "--threads", "4096"], "threads 4096 is above"),
        (["--model", "S/2", "--device", "tpu"], "device 'tpu' is not available"),
        (["--model", "S/2", "--json", "no/such/a.json"], "no/such does not exist"),
        (["--model", "S/2", "--json", "--csv"], "cannot both go to standard output"),
        (["--model", "S/2", "--json", "--html", "-"], "cannot both go to standard output"),
        (["--model", "S/2", "--json", "a", "--csv", "a"], "cannot both go to a: name another"),
        (["--model", "S/2", "--plot", f"{__file__}/plots"], "a directory is needed"),
        (["--model", "S/2", "--compare", __file__], "test_cli_bench.py is no report of dit-bench"),
        (["--model", "S/2", "--scaling", __file__], "test_cli_bench.py: not valid JSON"),
        (["--model", "S/2", "--plot", __file__], "is a file; --plot needs a directory"),
        (["--model", "S/2", "--backend", "eager", "--precision", "int8"], "'int8' is for backend"),
        (["measure"], "command 'measure' is unknown; choose one of gflops, fid"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(options) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown.err
    assert said in shown.err and shown.out == ""


def test_a_backend_without_its_kernels_is_no_part_of_another_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "why_not", lambda: "not built here")
    options = ["--model", "S/2", "--backend", "lean", "--parity", "--reference-set", "x"]
    assert cli.main([*options, "--inception-weights", "no.pth"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: Inception-v3 weights no.pth ") and shown.count("\n") == 1


def test_options_are_looked_at_before_what_is_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(["--model", "S/2", "--steps", "1001"]) == 2
    assert "error: steps 1001 is out of range" in capsys.readouterr().err
    assert cli.main(["--model", "S/2"]) == 2
    assert capsys.readouterr().err.startswith("error: rich is not installed: pip install")


@pytest.mark.parametrize("options", [["--batch", "0"], ["--size", "300"], ["--only", "x"]])
def test_options_out_of_range_are_code_2(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--model", "S/2", *options])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: argument --")


@pytest.mark.skipif(torch.cuda.is_available(), reason="TensorRT may be here")
def test_a_backend_that_cannot_run_here_ends_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before the weights of a large model are made."""
    monkeypatch.setattr(measure, "load_subject", lambda *_, **__: pytest.fail("made a model"))
    assert cli.main(["--model", "XL/2", "--backend", "trt"]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and shown.out == ""


def test_peers_have_the_precision_of_activations() -> None:
    found = parse_peers("diffusers, eager/fp32,trt,diffusers", "int8")
    assert found == [("diffusers", "bf16"), ("eager", "fp32"), ("tensorrt", "bf16")]
    assert {"diffusers", "openvino", "unet", "compile", "onnxruntime"} <= set(known_peers())


def test_env_names_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]["cpu_count"] == os.cpu_count()


def test_env_tells_which_backends_work_and_torch_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--env"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert sum(line[-1] == torch.__version__ for line in lines) == 1
    found = {line[0]: line[1] for line in lines if len(line) == 2}
    assert found["eager"] == found["compile"] == "yes"
    assert {"lean", "onnxruntime", "tensorrt", "memory", "load"} <= found.keys()
    if not torch.cuda.is_available():
        assert found["tensorrt"] != "yes"
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert float(found["memory"].split()[0]) == pytest.approx(pages, rel=0.05)
