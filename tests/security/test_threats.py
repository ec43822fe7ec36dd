"""SECURITY.md names an existing test for each threat."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
NAMED = [
    (ROOT / (path if "/" in path else f"tests/security/{path}"), name)
    for path, name in re.findall(r"`([\w/]+\.py)::(\w+)`", TEXT)
]


def test_every_threat_has_its_tests() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) > 25
    assert [row for row in rows if "::" not in row and "shown by" not in row] == []
    defined = {
        path: {f.name for f in ast.parse(path.read_text("utf-8")).body if hasattr(f, "name")}
        for path in {path for path, _ in NAMED}
    }
    assert [(path.name, name) for path, name in NAMED if name not in defined[path]] == []


def test_every_file_of_tests_guards_a_threat() -> None:
    files = {path.name for path in Path(__file__).parent.glob("test_*.py")}
    assert files - {path.name for path, _ in NAMED} == {Path(__file__).name}
