"""The figures in the documents are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dit_bench.cli import main
from dit_bench.result_tables import bounds_table
from dit_bench.show.markdown import report_markdown, update_document
from dit_bench.show.older_documents import block_and_table, cpu_table, gpu_table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/builtin-quality.json"


@pytest.mark.parametrize("document", ["dit_engine/builtin/README.md"])
def test_documents_show_the_committed_results(document: str) -> None:
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    text = (ROOT / document).read_text(encoding="utf-8")
    assert update_document(text, "quality", report_markdown(report)) == text
    (made,) = (r for r in report["rows"] if (r["section"], r["case"]) == ("distance", "generated"))
    assert f"| {made['distance']:.4g} |" in text


def test_the_committed_cpu_results_are_shown() -> None:
    (results,) = (ROOT / "benchmarks/results").glob("cpu-*.json")
    report = json.loads(results.read_text(encoding="utf-8"))
    text = (ROOT / "benchmarks/results/README.md").read_text(encoding="utf-8")
    assert update_document(text, "cpu", cpu_table(report)) == text
    xl = report["sections"][0]
    ratios = [row["ratio"]["median"] for row in xl["rows"]]
    (line,) = (line for line in text.splitlines() if line.startswith("| XL/2, batch 2 |"))
    assert sorted(f"{r:.2f}" for r in ratios) == sorted(line.strip("| ").split(" | ")[2:])
    memory = report["sections"][-1]["rows"][0]["memory"]["ratio"]
    assert f"peak memory in a step ÷ (weights + activations) {memory:.2f}" in text


OF_RESULTS = {
    "profile": "profile-amd-epyc",
    "operators": "operators-cpu-amd-epyc",
    "paper-models": "paper-models-cpu",
    "scaling": "scaling",
    "quality": "builtin-quality-int8",
    "parity": "parity-builtin",
    "bounds": "cpu-amd-epyc",
}


def committed(name: str) -> dict[str, Any]:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("block", OF_RESULTS)
def test_the_index_of_results_shows_the_committed_ones(block: str) -> None:
    text = (ROOT / "benchmarks/results/README.md").read_text(encoding="utf-8")
    beside = committed(OF_RESULTS["operators"]) if block == "bounds" else None
    report = committed(OF_RESULTS[block])
    found, table = (
        (report["kind"], report_markdown(report)) if "kind" in report
        else block_and_table(report, beside)
    )  # fmt: skip
    assert found == block
    assert update_document(text, block, table) == text


def test_what_the_index_says_of_int8() -> None:
    bf16, int8 = (committed(f"builtin-quality{suffix}") for suffix in ("", "-int8"))
    assert [r["settings"].pop("precision") for r in (bf16, int8)] == ["bf16", "int8"]
    assert bf16["settings"] == int8["settings"]
    distances = [row["distance"] for r in (bf16, int8) for row in r["rows"]
                 if (row["section"], row["case"]) == ("distance", "generated")]  # fmt: skip
    assert distances[1] == pytest.approx(distances[0], rel=0.01)


def test_what_the_index_says_of_the_papers_claims() -> None:
    points = committed("scaling")["rows"]
    for steps in {point["steps"] for point in points}:
        found = {p["case"]: p for p in points if p["steps"] == steps}
        unet = found.pop("U-Net")
        by_cost = sorted(found.values(), key=lambda point: point["gmacs"])
        distances = [point["distance"] for point in by_cost]
        assert distances == sorted(distances, reverse=True)  # more Gflops, a lower distance
        assert unet["gmacs"] == pytest.approx(1.025 * by_cost[-1]["gmacs"], rel=1e-3)
        assert unet["distance"] < distances[-1]  # and the U-Net's is lower still


def test_the_index_names_every_file_of_results() -> None:
    text = (ROOT / "benchmarks/results/README.md").read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks/results").iterdir():
        pattern = path.name
        if path.name.startswith("session-options"):
            pattern = "session-options-*.json"
        assert path.name == "README.md" or f"`{pattern}" in text, path.name


def test_the_least_ratio_is_the_products_time_over_the_peers() -> None:
    """28 blocks × 512 tokens × 12 · 1152² multiply-adds of DiT-XL/2 at batch 2."""
    cpu = committed("cpu-amd-epyc")
    machine = {"cpu": cpu["hardware"]["cpu"], "torch_threads": cpu["hardware"]["torch_threads"]}
    int8 = {"operator": "linear_int8", "dtype": "bf16", "status": "ok", "unit": "TFLOP/s"}
    operators = {
        "environment": machine,
        "load_average": 0.1,
        "ceilings": {"matmul_tflop_s": {"bf16": 0.25}},
        "operators": [
            {"operator": "linear", "dtype": "bf16", "status": "ok", "rate": 0.5, "unit": "TFLOP/s"},
            {"operator": "linear", "dtype": "fp32", "status": "ok", "rate": 9.0, "unit": "TFLOP/s"},
            int8 | {"rate": 0.8},
            int8 | {"opponent": True, "rate": 0.45},
        ],
    }
    table = bounds_table(cpu, operators)
    for precision, rate in (("bf16", 0.5e12), ("int8", 0.8e12)):
        least_ms = 2 * 28 * 512 * 12 * 1152**2 / rate * 1e3
        pair = (f"lean {precision}", "diffusers bf16")
        (row,) = (r for r in cpu["sections"][0]["rows"] if (r["ours"], r["theirs"]) == pair)
        (line,) = (line for line in table.splitlines() if " ÷ ".join(pair) in line)
        assert line.endswith(f"| {least_ms / row['theirs_ms']:.2f} |")
    assert "measure again" not in table
    assert "measure again" in bounds_table(cpu, operators | {"load_average": 1.0})
    other = operators | {"environment": machine | {"torch_threads": 64}}
    with pytest.raises(ValueError, match="two machines"):
        bounds_table(cpu, other)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "schema None is not"), ("[]", "a report is a JSON object"), ("{", "not valid JSON")],
)
def test_other_files_are_refused_in_one_line(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    assert main(["documents", str(path), str(tmp_path / "document.md")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_unet_that_was_not_timed_is_missed() -> None:
    report = committed("paper-models-cpu")
    report["measurements"] = [row for row in report["measurements"] if "ratio" not in row]
    with pytest.raises(ValueError, match="S/2 or the U-Net beside it was not timed"):
        block_and_table(report)


def test_a_busy_machine_is_told_of() -> None:
    (results,) = (ROOT / "benchmarks/results").glob("cpu-*.json")
    report = json.loads(results.read_text(encoding="utf-8"))
    assert "no idle machine's" in cpu_table(report | {"load_average": 1.5})
    assert "no idle machine's" not in cpu_table(report | {"load_average": 0.1})


def test_a_document_is_changed_in_its_block_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "card.md"
    document.write_text("before\n<!-- quality -->\nold\n<!-- /quality -->\nafter\n")
    assert main(["documents", str(RESULTS), str(document)]) == 0
    text = document.read_text()
    assert text.startswith("before\n<!-- quality -->\n**Against") and text.endswith("after\n")
    assert "old" not in text
    document.write_text("no block")
    assert main(["documents", str(RESULTS), str(document)]) == 2
    assert "no '<!-- quality -->'" in capsys.readouterr().err
    assert document.read_text() == "no block"


def test_documents_show_the_committed_gpu_results() -> None:
    """Where a document has the block, and whenever a GPU's results are committed."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    results = sorted((ROOT / "benchmarks/results").glob("gpu-*.json"))
    assert ("<!-- gpu -->" in text) == bool(results)
    for path in results[:1]:
        report = json.loads(path.read_text(encoding="utf-8"))
        assert update_document(text, "gpu", gpu_table(report)) == text
