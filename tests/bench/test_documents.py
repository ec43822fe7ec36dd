"""The figures in the documents are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dit_bench.documents import cpu_table, main, quality_table, update_document

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/builtin-quality.json"


@pytest.mark.parametrize("document", ["README.md", "dit_engine/builtin/README.md"])
def test_documents_show_the_committed_results(document: str) -> None:
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    text = (ROOT / document).read_text(encoding="utf-8")
    assert update_document(text, "quality", quality_table(report)) == text
    assert f"| {report['distances']['generated']['value']:.1f} |" in text


def test_the_readme_shows_the_committed_cpu_results() -> None:
    (results,) = (ROOT / "benchmarks/results").glob("cpu-*.json")
    report = json.loads(results.read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert update_document(text, "cpu", cpu_table(report)) == text
    xl = report["sections"][0]
    ratios = [row["ratio"]["median"] for row in xl["rows"]]
    (line,) = (line for line in text.splitlines() if line.startswith("| XL/2, batch 2 |"))
    assert sorted(f"{r:.2f}" for r in ratios) == sorted(line.strip("| ").split(" | ")[2:])
    memory = report["sections"][-1]["rows"][0]["memory"]["ratio"]
    assert f"peak memory ÷ (weights + activations) {memory:.2f}" in text


def test_a_document_is_changed_in_its_block_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "card.md"
    document.write_text("before\n<!-- quality -->\nold\n<!-- /quality -->\nafter\n")
    assert main([str(RESULTS), str(document)]) == 0
    text = document.read_text()
    assert text.startswith("before\n<!-- quality -->\n| FD-Lite0") and text.endswith("after\n")
    assert "old" not in text
    document.write_text("no block")
    assert main([str(RESULTS), str(document)]) == 2
    assert "no '<!-- quality -->'" in capsys.readouterr().err
    assert document.read_text() == "no block"
