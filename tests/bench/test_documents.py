"""The figures in the documents are those of the committed results."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import made_up
import pytest

from dit_bench.cli import main
from dit_bench.report import read
from dit_bench.show.blocks import bounds_table, speed_table
from dit_bench.show.markdown import report_markdown, update_document
from dit_bench.show.tables import Table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/builtin-quality.json"
BLOCKS = {
    "cpu": "cpu-amd-epyc", "profile": "profile-amd-epyc", "operators": "operators-cpu-amd-epyc",
    "busy": "busy-amd-epyc", "onnxruntime": "onnxruntime-cpu", "quality": "builtin-quality-int8",
    "parity": "parity-builtin", "models": "paper-models-cpu", "scaling": "scaling",
}  # fmt: skip


def committed(name: str) -> dict[str, Any]:
    return read(ROOT / f"benchmarks/results/{name}.json")


def test_documents_show_the_committed_results() -> None:
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    for block, name in BLOCKS.items():
        assert update_document(text, block, report_markdown(committed(name))) == text, block
    cpu, operators = committed("cpu-amd-epyc"), committed("operators-cpu-amd-epyc")
    assert update_document(text, "bounds", bounds_table(cpu, operators)) == text
    assert sorted(BLOCKS) == sorted(set(re.findall(r"<!-- ([a-z]+) -->", text)) - {"bounds"})
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert update_document(readme, "speed", speed_table(cpu)) == readme
    card = (ROOT / "dit_engine/builtin/README.md").read_text(encoding="utf-8")
    assert update_document(card, "quality", report_markdown(read(RESULTS))) == card
    ratios = {(r["ours"], r["theirs"]): r for r in cpu["ratios"] if r["case"] == "XL/2, batch 2"}
    median = ratios["lean bf16", "openvino bf16"]["ratio"]["median"]
    head, _, xl = text[text.index("|  | lean bf16, ms") :].splitlines()[:3]
    assert xl.startswith("| XL/2, batch 2 ")
    shown = dict(zip(head.split(" | "), xl.split(" | "), strict=True))
    assert shown["lean bf16 ÷ openvino bf16"] == f"{median:.2f}"
    (xl,) = (line for line in readme.splitlines() if line.startswith("| DiT-XL/2"))
    assert f"| {ratios['lean bf16', 'openvino bf16']['theirs_ms']:.4g} |" in xl


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
        assert path.name == "README.md" or f"`{path.name}" in text, path.name


def test_the_least_ratio_is_the_products_time_over_the_peers() -> None:
    """28 blocks × 512 tokens × 12 · 1152² multiply-adds of DiT-XL/2 with 2 rows."""
    cpu = committed("cpu-amd-epyc")
    linear = {"operator": "linear", "dtype": "bf16", "status": "ok", "rate": 0.5}
    int8 = linear | {"operator": "linear_int8", "rate": 0.8}
    rows = [linear, linear | {"dtype": "fp32", "rate": 9.0}, int8,
            int8 | {"role": "peer", "rate": 0.45}]  # fmt: skip
    ceilings = {"matmul_tflop_s": {"bf16": 0.25}}
    operators = {"machine": cpu["machine"], "ceilings": ceilings, "rows": rows}
    table = bounds_table(cpu, operators)
    for precision, rate in (("bf16", 0.5e12), ("int8", 0.8e12)):
        least_ms = 2 * 28 * 512 * 12 * 1152**2 / rate * 1e3
        (row,) = (r for r in cpu["ratios"] if r["goal"] and r["ours"] == f"lean {precision}"
                  and r["theirs"] == "diffusers bf16")  # fmt: skip
        (line,) = (t for t in table.splitlines() if f"lean {precision} ÷ diffusers bf16" in t)
        assert line.endswith(f"| {least_ms / row['theirs_ms']:.2f} |")
    other = operators | {"machine": cpu["machine"] | {"threads": 64}}
    with pytest.raises(ValueError, match="two machines"):
        bounds_table(cpu, other)


def table_of(name: str, title: str) -> list[dict[str, str]]:
    """The rows of the table of a report that follows the title, each by its columns' names."""
    after = report_markdown(committed(name)).split(f"**{title}")[1].split("\n\n")[1]
    head, _, *rows = [line[2:-2].split(" | ") for line in after.splitlines()]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_one_row_for_each_subject_with_its_precision() -> None:
    rows = table_of("profile-amd-epyc", "Where the time of one forward goes")
    subjects = [f"{m}, batch 2, lean {p}" for m in ("XL/2", "S/2") for p in ("bf16", "int8")]
    assert [row["one forward"] for row in rows] == subjects
    assert rows[1]["linears"] == "89.2%" and rows[1]["of it qkv"] == "22.8%"
    busy = table_of("busy-amd-epyc", "Milliseconds, idle → beside busy programs")
    assert len(busy) == 3 and busy[0]["openvino bf16"] == "7.652 → 12.07 (1.70)"
    scaling = table_of("scaling", "FD-Lite0 against Gflops")
    assert len(scaling) == 5 and scaling[-1]["FD-Lite0 after 3000 steps"] == "111.1"
    paper = table_of("paper-models-cpu", "Medians of times")
    assert len(paper) == 4 and paper[-1]["LDM-4 U-Net bf16 ÷ lean bf16"] == "1.26 (1.23–1.34)"


def test_grids_say_what_failed_and_what_is_noisy() -> None:
    report = made_up.report()
    report["rows"][0]["noisy"] = True
    shown = report_markdown(report | {"complete": False})
    assert "skipped: no <such> processor" in html.unescape(shown)
    assert "4, noisy" in shown and "INTERRUPTED" in shown
    ratios = [{"case": "S/8", "ours": "a", "theirs": "b", "reason": "no b here"}]
    assert "skipped: no b here" in report_markdown(report | {"ratios": ratios})


def test_what_all_rows_share_joins_the_title() -> None:
    table = Table("t", ["of", "N", "x"], rows=[["a", "9", "1"], ["b", "9", "2"]], notes=["--wide"])
    assert table.markdown() == "**t** (N 9)\n\n| of | x |\n|---|---:|\n| a | 1 |\n| b | 2 |\n"
    table.rows.pop()
    assert "| a | 9 | 1 |" in table.markdown()


def test_a_busy_machine_is_told_of() -> None:
    report = committed("cpu-amd-epyc")
    del report["other_load"]  # what was seen during the run counts for more
    assert "Measure again" in report_markdown(report | {"load_average": 1.5})
    assert "Measure again" not in report_markdown(report | {"load_average": 0.1})


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
