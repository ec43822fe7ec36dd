"""Where images go: a note before anything is replaced or added to; "-" is standard output."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_engine import Engine
from dit_engine.cli.generate import main

OPTIONS = ("--labels", "1", "2", "--steps", "2", "--device", "cpu")


def lines_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> list[str]:
    """What the command says until it generates, after which it goes on."""
    said, generate = [], Engine.generate

    def listened(*values: object, **options: object) -> object:
        said.append(capsys.readouterr().err)
        return generate(*values, **options)

    monkeypatch.setattr(Engine, "generate", listened)
    assert main([*OPTIONS, *arguments]) == 0
    monkeypatch.setattr(Engine, "generate", generate)
    capsys.readouterr()
    return [line for line in said[0].splitlines() if line.startswith("note: ")]


@pytest.mark.parametrize("name", ["sheet.png", "images.npy", "latents.safetensors", None])
def test_a_file_is_replaced_after_a_word(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], name: str | None,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", str(model), *(["-o", name] if name else [])]
    path = tmp_path / (name or "sheet.png")  # the usual name
    assert lines_before_the_work(monkeypatch, capsys, *arguments, "--seed", "1") == []
    first = path.read_bytes()
    note = f"note: {path.name} exists and will be replaced"
    assert lines_before_the_work(monkeypatch, capsys, *arguments, "--seed", "2") == [note]
    assert path.read_bytes() != first
    for silent in ("--quiet", "--overwrite"):
        assert lines_before_the_work(monkeypatch, capsys, *arguments, silent) == []


def test_a_directory_is_added_to_after_a_word(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", str(model), "-o", str(tmp_path / "out"))
    assert lines_before_the_work(monkeypatch, capsys, *arguments) == []
    note = f"note: {tmp_path / 'out'} holds other PNGs (%d), which stay"
    hint = "; give the --seed of an earlier call to continue that call instead"
    assert lines_before_the_work(monkeypatch, capsys, *arguments) == [note % 2 + hint]
    assert len(list((tmp_path / "out").iterdir())) == 4
    assert lines_before_the_work(monkeypatch, capsys, *arguments, "--seed", "1") == [note % 4]


def test_a_dash_is_standard_output(
    model: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    arguments = [*OPTIONS, "--model", str(model), "--seed", "3"]
    assert main([*arguments, "-o", str(tmp_path / "sheet.png")]) == 0
    capfdbinary.readouterr()
    for more in ([], ["--quiet"]):
        assert main([*arguments, "-o", "-", *more]) == 0
        out, err = capfdbinary.readouterr()
        assert out == (tmp_path / "sheet.png").read_bytes()
        assert bool(more) == (err == b"")
    assert "→ standard output" in err.decode() or more
    with Image.open(io.BytesIO(out)) as image:
        assert np.asarray(image).std() > 0 and "dit_engine" in image.text
    assert not (tmp_path / "-").exists()


def test_a_terminal_gets_no_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main([*OPTIONS, "--model", "nowhere", "-o", "-"]) == 2
    assert capsys.readouterr().err == (
        "error: -o - writes a PNG to standard output, which is a terminal here: redirect it, or "
        "name a file\n"
    )


@pytest.mark.slow
def test_in_a_pipe(model: Path, tmp_path: Path) -> None:
    """Whole, whatever the terminal's encoding; quiet where nobody reads; an error when full."""
    command = [sys.executable, "-m", "dit_engine.cli.generate", *OPTIONS, "--model", str(model),
               "-o", "-", "--quiet"]  # fmt: skip
    env = {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=env, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    Image.open(io.BytesIO(done.stdout)).load()
    for redirected, code, line in (
        ("> /dev/full", 2, b"error: standard output cannot be written: No space left on device\n"),
        ("| exit 0", 141, b""),
    ):
        shell = f'set -o pipefail; "$0" "$@" {redirected}'
        done = subprocess.run(["bash", "-c", shell, *command], capture_output=True, env=env)
        assert (done.returncode, done.stderr) == (code, line)


def test_a_path_to_a_dash_is_no_standard_output(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*OPTIONS, "--model", str(model), "--seed", "3", "-o", "./-"]) == 0
    assert len([*(tmp_path / "-").glob("*.png")]) == 2


def test_a_closed_standard_output_is_told_before_the_work() -> None:
    program = (
        "import sys\nfrom dit_engine.cli.generate import main\n"
        "sys.exit(main(['--labels', '3', '--model', 'not-there', '-o', '-']))"
    )
    command = ["bash", "-c", 'exec "$0" -c "$1" >&-', sys.executable, program]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "standard output is closed" in done.stderr
