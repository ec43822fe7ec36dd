"""A progress bar that an exception interrupts is closed, and its line wiped away."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from tqdm import tqdm

from dit_engine import Engine
from dit_engine.cli.generate import main
from dit_engine.console.bars import Bar
from dit_engine.console.run import run_command


def on_screen(written: str) -> list[str]:
    """The lines that a terminal shows."""
    lines = []
    for line in written.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return [line for line in lines if line]


@pytest.mark.parametrize("error", [ValueError("a fault"), KeyboardInterrupt(), MemoryError("none")])
@pytest.mark.parametrize("looped", [True, False])
def test_a_command_that_fails_under_a_bar(
    error: BaseException, looped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> int:
        if looped:
            for i in Bar(range(4), "encoding", mininterval=0):
                if i == 2:
                    raise error
        with Bar(total=4, desc="sampling", mininterval=0) as bar:
            bar.update(2)
            raise error

    assert run_command(command) in (2, 130)
    told = capsys.readouterr().err
    assert "2/4" in told or "1/4" in told  # there was one
    assert on_screen(told) == [f"error: {error}" if str(error) else "interrupted"]
    assert not list(getattr(tqdm, "_instances", ()))


def test_a_bar_at_its_end_stays() -> None:
    file = io.StringIO()
    for _ in Bar(range(3), "encoding", file=file):
        pass
    (line,) = on_screen(file.getvalue())
    assert "3/3" in line


def test_generation_that_fails_midway(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = Engine.generate

    def fails(engine: Engine, labels: list[int], **options: object) -> object:
        if 3 in labels:
            raise ValueError("no threes")
        return generate(engine, labels, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Engine, "generate", fails)
    options = ["--model", str(model), "--device", "cpu", "--steps", "2", "--max-batch-size", "1"]
    assert main([*options, "--labels", "1", "3", "-o", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "image-step" in told and on_screen(told) == ["error: no threes"]
