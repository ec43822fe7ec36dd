"""The choices of kernels that ``dit-bench --env`` lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dit_bench import cli


def test_env_lists_what_was_chosen_by_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIT_ENGINE_CACHE", str(tmp_path))
    times = {
        "qkv 2x256x1152": {"library": 0.02, "128x128": 0.0197},  # less than 2 % quicker
        "fc1 2x256x1152": {"library": 0.025, "128x144": 0.02, "128x256": None},
    }
    (tmp_path / "choices").mkdir()
    held = {"facts": {"device": "NVIDIA H200"}, "times": times}
    (tmp_path / "choices" / "nvidia-h200.json").write_text(json.dumps(held))
    (tmp_path / "choices" / "nvidia-h100.json").write_text("{")
    assert cli.main(["--env"]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith(
        "chosen on NVIDIA H200\n"
        "  qkv 2x256x1152   library 0.0200 ms\n"
        "  fc1 2x256x1152   128x144 0.0200 ms (library 0.0250)\n"
    )
