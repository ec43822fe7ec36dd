"""The figures in the documents are those of the committed results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dit_bench.cli import main
from dit_bench.report import read
from dit_bench.show.documents import bounds_table, report_markdown, speed_table, update_document

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
BLOCKS = {
    "cpu": "cpu-amd-epyc", "profile": "profile-amd-epyc", "operators": "operators-cpu-amd-epyc",
    "busy": "busy-amd-epyc", "onnxruntime": "onnxruntime-cpu", "quality": "builtin-quality-int8",
    "parity": "parity-builtin", "models": "paper-models-cpu", "scaling": "scaling",
}  # fmt: skip


def committed(name: str) -> dict[str, Any]:
    return read(RESULTS / f"{name}.json")


def test_documents_show_the_committed_results() -> None:
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    for block, name in BLOCKS.items():
        assert update_document(text, block, report_markdown(committed(name))) == text, block
    cpu, operators = committed("cpu-amd-epyc"), committed("operators-cpu-amd-epyc")
    assert update_document(text, "bounds", bounds_table(cpu, operators)) == text
    gpus = [report_markdown(read(path)) for path in RESULTS.glob("gpu-*.json")]
    gpus = gpus or ["Nothing was measured on a GPU yet.\n"]
    assert any(update_document(text, "gpu", table) == text for table in gpus)
    shown = set(re.findall(r"<!-- ([a-z]+) -->", text)) - {"bounds", "gpu"}
    assert sorted(BLOCKS) == sorted(shown)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert update_document(readme, "speed", speed_table(cpu)) == readme
    card = (ROOT / "dit_engine/builtin/README.md").read_text(encoding="utf-8")
    assert update_document(card, "quality", report_markdown(committed("builtin-quality"))) == card


def test_the_tables_hold_the_figures_of_the_reports() -> None:
    """Read by their columns' names: a wrong column would come out of every run the same."""
    tables = {name: report_markdown(committed(name)) for name in BLOCKS.values()}
    tables["speed"] = "**speed**\n\n" + speed_table(committed("cpu-amd-epyc"))
    for name, row, expected in (
        ("cpu-amd-epyc", "XL/2, batch 2", {"lean bf16, ms": "1096", "lean bf16 ÷ openvino bf16":
                                           "0.89", "lean int8 ÷ diffusers bf16": "0.42"}),
        ("speed", "DiT-XL/2 at 256 px, 1 image", {"lean bf16": "1096", "OpenVINO bf16": "1232"}),
        ("profile-amd-epyc", "XL/2, batch 2, lean int8", {"linears": "89.2%",
                                                          "of it qkv": "22.8%"}),
        ("busy-amd-epyc", "builtin, batch 2", {"openvino bf16": "7.652 → 12.07 (1.70)"}),
        ("scaling", "U-Net", {"FD-Lite0 after 3000 steps": "111.1"}),
        ("paper-models-cpu", "XL/2, batch 1: one forward",
         {"LDM-4 U-Net bf16 ÷ lean bf16": "1.26 (1.23–1.34)"}),
    ):  # fmt: skip
        head, _, *lines = [line[2:-2].split(" | ") for line in tables[name].split("\n\n")[1]
                           .splitlines()]  # fmt: skip
        (cells,) = (line for line in lines if line[0] == row)
        assert expected.items() <= dict(zip(head, cells, strict=True)).items(), name


def test_what_the_documents_say_of_int8_and_of_the_papers_claims() -> None:
    bf16, int8 = (committed(f"builtin-quality{suffix}") for suffix in ("", "-int8"))
    assert [r["settings"].pop("precision") for r in (bf16, int8)] == ["bf16", "int8"]
    assert bf16["settings"] == int8["settings"]
    distances = [row["distance"] for r in (bf16, int8) for row in r["rows"]
                 if (row["section"], row["case"]) == ("distance", "generated")]  # fmt: skip
    assert distances[1] == pytest.approx(distances[0], rel=0.01)
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
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    for path in RESULTS.iterdir():
        assert path.name == "README.md" or f"`{path.name}" in text, path.name


def test_the_least_ratio_is_the_products_time_over_the_peers() -> None:
    """28 blocks × 512 tokens × 12 · 1152² multiply-adds of DiT-XL/2 with 2 rows."""
    cpu = committed("cpu-amd-epyc")
    linear = {"operator": "linear", "dtype": "bf16", "rate": 0.5}
    rows = [linear, linear | {"dtype": "fp32", "rate": 9.0},
            linear | {"operator": "linear_int8", "rate": 0.8}]  # fmt: skip
    operators = {"machine": cpu["machine"], "rows": rows}
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


def test_a_document_is_changed_in_its_block_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document, arguments = tmp_path / "card.md", ["documents", str(RESULTS / "builtin-quality.json")]
    document.write_text("before\n<!-- quality -->\nold\n<!-- /quality -->\nafter\n")
    assert main([*arguments, str(document)]) == 0
    text = document.read_text()
    assert text.startswith("before\n<!-- quality -->\n**Against") and text.endswith("after\n")
    assert "old" not in text
    document.write_text("no block")
    assert main([*arguments, str(document)]) == 2
    assert "no '<!-- quality -->'" in capsys.readouterr().err
    assert document.read_text() == "no block"
