"""Commands tell libgomp how long to wait awake before torch loads it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dit_bench
from dit_engine.console.run import SPINS

SHOW = """
import os, sys
from dit_engine.cli.generate import main
assert "torch" not in sys.modules
try:
    main(["--version"])
except SystemExit:
    print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_what_the_environment_says_is_left(given: dict[str, str], expected: str) -> None:
    kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", SHOW], env=kept | given,
                          capture_output=True, text=True, check=True, timeout=60)  # fmt: skip
    assert done.stdout.splitlines()[-1] == expected


@pytest.mark.parametrize(
    ("command", "end"),
    [
        ("dit_engine.cli.train", ["--help"]),
        ("dit_export.cli", ["--version"]),
        ("dit_bench.cli", ["no-such-word"]),
    ],
)
def test_every_command_waits_briefly_before_torch(
    command: str, end: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    code = (
        f"import os, sys, contextlib; from {command} import main\n"
        "assert 'torch' not in sys.modules\n"
        f"with contextlib.suppress(SystemExit): main({end})\n"
        "print(os.environ.get('GOMP_SPINCOUNT'), flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          timeout=60)  # fmt: skip
    assert done.stdout.splitlines()[-1] == SPINS


BENCHMARKS = Path(dit_bench.__file__).parent
LIGHT = {"cli", "documents"}  # the first imports torch late, the second computes nothing


def test_modules_run_by_name_wait_briefly_before_their_imports() -> None:
    found = []
    for path in sorted(BENCHMARKS.rglob("*.py")):
        text = path.read_text()
        if '\nif __name__ == "__main__":' not in text or path.stem in LIGHT:
            continue
        first = next(node for node in ast.parse(text).body if not is_header(node))
        assert isinstance(first, ast.If), f"{path.name} imports before it waits briefly"
        assert ast.unparse(first.body[-1]) == "wait_briefly()", path.name
        found.append(path.stem)
    assert found


def is_header(node: ast.stmt) -> bool:
    """The docstring, or the import of annotations."""
    return isinstance(node, ast.Expr) or (
        isinstance(node, ast.ImportFrom) and node.module == "__future__"
    )
