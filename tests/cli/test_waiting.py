"""Commands tell libgomp how long to wait awake before torch loads it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dit_engine.cli.waiting import SPINS

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
