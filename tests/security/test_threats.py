"""SECURITY.md names an existing test for each threat."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
NAMED = {
    (ROOT / (path if "/" in path else f"tests/security/{path}"), name)
    for path, name in re.findall(r"`([\w/]+\.py)::(\w+)`", TEXT)
}


def test_every_threat_has_its_tests() -> None:
    rows = [line for line in TEXT.splitlines() if re.match(r"\| (?!what a stranger)", line)]
    assert len(rows) > 25 and all("::" in row for row in rows)
    for path, name in NAMED:
        assert name in {getattr(f, "name", "") for f in ast.parse(path.read_text("utf-8")).body}
    files = {path.name for path in Path(__file__).parent.glob("test_*.py")}
    assert files - {path.name for path, _ in NAMED} == {Path(__file__).name}
