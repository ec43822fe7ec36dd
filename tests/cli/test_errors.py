"""What is wrong is told in one line, before anything is computed or written."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dit_bench.cli import main as bench_main
from dit_engine.cli import generate
from dit_engine.console.run import run_command
from dit_engine.engine import Engine
from dit_engine.runtime import parse_device


def run(model: Path, *arguments: str) -> object:
    """Exit code, argparse's too."""
    try:
        return generate.main(["--model", str(model), "--labels", "1", "--steps", "2", *arguments])
    except SystemExit as stopped:
        return stopped.code


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("\n") and captured.err.count("\n") == 1
    assert "\r" not in captured.err
    return captured.err.rstrip("\n")


BAD = [
    (["--labels", "unicorn"], "label 'unicorn' is unknown"),
    (["--labels", "10"], "label 10 is out of range; allowed are 0 to 9"),
    (["--steps", "0"], "steps 0"),
    (["--steps", "1001"], "steps 1001"),
    (["--steps", "ten"], "--steps: invalid int value: 'ten' (see dit-generate --help)"),
    (["--step-count", "10"], "--step-count 10 (see dit-generate --help)"),
    (["--num-inference-steps", "10"], "(see dit-generate --help); did you mean --steps?"),
    (["--guidence-scale=3"], "(see dit-generate --help); did you mean --guidance-scale?"),
    (["--guidance-scale", "-1"], "guidance_scale -1.0 is negative: 0 and above are allowed"),
    (["--backend", "onnx"], "backend 'onnx' is unknown; did you mean 'onnxruntime'? choose one of"),
    (["--backend", "Lean"], "did you mean 'lean'?"),
    (["--sampler", "euler"], "sampler 'euler'"),
    (["--spacing", "odd"], "spacing 'odd'"),
    (["--guidance-channels", "foo"], "'foo' is neither a number of latent channels (1, 2, …)"),
    (["--guidance-channels", "5"], "guidance_channels 5 is out of range: allowed is 1 to 4"),
    (["--guidance-interval", "5", "1"], "upside down"),
    (["--backend", "magic"], "backend 'magic' is unknown"),
    (["--device", "foo"], "device 'foo' is not available; allowed: cpu"),
    (["--device", "meta"], "device 'meta' is not available; allowed: cpu"),
    (["--device", "cuda:99"], "device 'cuda:99' is not available; allowed: cpu"),
    (["--latents", "nowhere.npy"], "nowhere.npy does not exist"),
    (["--latents", "z.pt"], "z.pt: use a .npy or a .safetensors file"),
    (["--model", "nowhere.pt"], "nowhere.pt"),
    (["--columns", "0"], "columns 0 is not a positive integer"),
    (["--columns", "3", "-o", "images"], "--columns is of a sheet, a .png, and images is none"),
    (["--columns", "3", "-o", "a.npy"], "--columns is of a sheet, a .png, and a.npy is none"),
    (["-o", "missing/sheet.png"], "missing/sheet.png: the directory missing does not exist"),
    (["-o", "sheet.jpg"], "sheet.jpg: .jpg files are not written; use .png, .npy, .safetensors"),
    (["-o", "/proc/sheet.png"], "/proc/sheet.png cannot be written: "),
    (["-o", "/proc/new/images"], "/proc/new/images cannot be written: "),
    (["-o", "x" * 250 + ".png"], "cannot be written: File name too long"),
    (["-o", "x" * 300], "File name too long"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_one_line_and_exit_code_2(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(model, *arguments) == 2
    line = only_line(capsys)
    assert line.startswith("error: ") and message in line
    assert list(tmp_path.iterdir()) == []


def test_the_help_lists_the_backends_without_torch() -> None:
    code = """
import sys
from dit_engine.cli.generate import build_parser as generate
from dit_bench.options import build_parser as bench
for parser in (generate(), bench("")):
    text = " ".join(parser.format_help().split())
    assert "auto, eager, compile, lean, onnxruntime, tensorrt, triton" in text
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_labels_are_needed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--model", str(model)]) == 2
    assert only_line(capsys).startswith("error: give --labels, class names or numbers")


@pytest.mark.parametrize("name", ["sheet.png", "images.npy", "images"])
def test_a_model_without_vae_makes_no_images(
    bare_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run(bare_model, "-o", str(tmp_path / name)) == 2
    line = only_line(capsys)
    assert "this model has no VAE" in line and ".safetensors" in line and "--vae" in line
    assert list(tmp_path.iterdir()) == []


def test_an_output_in_the_way(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("here first")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    for name, message in (
        ("file", "it is a file; a directory is needed"),
        ("file/deeper", f"{tmp_path / 'file'} is a file; a directory is needed"),
        ("file/sheet.png", f"{tmp_path / 'file'} is a file and no directory"),
        ("folder.png", "is a directory; a file name is needed"),
        ("link", "a directory is needed"),
    ):
        assert run(model, "-o", str(tmp_path / name)) == 2
        assert message in only_line(capsys)
    assert (tmp_path / "file").read_text() == "here first"
    assert sorted(tmp_path.iterdir()) == before and not any((tmp_path / "folder.png").iterdir())


def damaged(directory: Path) -> dict[str, Path]:
    """Files that are no latents, by what they are."""
    z = torch.zeros(1, 4, 8, 8)
    save_file({"a": z, "b": z + 1}, directory / "two.safetensors")
    save_file({"z": z.bool()}, directory / "bool.safetensors")
    whole = (directory / "two.safetensors").read_bytes()
    (directory / "cut.safetensors").write_bytes(whole[:-100])
    (directory / "noise.safetensors").write_bytes(bytes(range(256)))
    (directory / "empty.safetensors").touch()
    (directory / "empty.npy").touch()
    np.save(directory / "words.npy", np.array(["cat", "dog"]))
    np.save(directory / "objects.npy", np.array([{}, []], object), allow_pickle=True)
    np.save(directory / "complex.npy", np.zeros((1, 4, 8, 8), complex))
    np.save(directory / "cut.npy", z.numpy())
    (directory / "cut.npy").write_bytes((directory / "cut.npy").read_bytes()[:-8])
    with (directory / "archive.npy").open("wb") as file:
        np.savez(file, z=z.numpy())
    (directory / "zip.npy").write_bytes((directory / "archive.npy").read_bytes()[:40])
    (directory / "folder.npy").mkdir()
    np.save(directory / "shape.npy", np.zeros((2, 4, 8, 8), np.float32))
    np.save(directory / "nan.npy", np.full((1, 4, 8, 8), np.nan, np.float32))
    return {p.name: p for p in directory.iterdir()}


@pytest.mark.parametrize("option", ["--latents", "--step-noise"])
def test_damaged_tensors_are_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    output = tmp_path / "out.png"
    (tmp_path / "given").mkdir()
    for name, path in damaged(tmp_path / "given").items():
        assert run(model, option, str(path), "-o", str(output)) == 2, name
        line = only_line(capsys)
        read = name not in ("shape.npy", "nan.npy")  # those the engine refuses
        assert (str(path) if read else option[2:].replace("-", "_")) in line, line
        assert not output.exists()


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_device("cpu") == torch.device("cpu") == parse_device(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse_device(None) == torch.device("cpu")
    for name in ("foo", "cuda", "meta", "cuda:x", "", "cpu:1", 0):
        with pytest.raises(ValueError, match=rf"^device '{name}' is not available; allowed: cpu"):
            parse_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for name in (None, "cuda", "cuda:1", torch.device("cuda")):
        assert parse_device(name) == torch.device("cuda", 1)
    assert parse_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r"device 'cuda:2' .* cpu, cuda, (.*, )?cuda:0, cuda:1$"):
        parse_device("cuda:2")


def test_only_users_errors_are_caught(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: Exception) -> int:
        raise error

    for error in (
        ValueError("two\nlines"),
        torch.OutOfMemoryError("two\nlines"),
        MemoryError("two lines"),
    ):
        assert run_command(lambda error=error: fail(error)) == 2
        assert only_line(capsys) == "error: two lines"
    assert run_command(lambda: fail(MemoryError())) == 2
    assert only_line(capsys) == "error: MemoryError"
    for ours in (RuntimeError("shapes differ"), TypeError("a bug"), AssertionError("a bug")):
        with pytest.raises(type(ours)):
            run_command(lambda ours=ours: fail(ours))


# What is printed → its statement: more than a buffer holds, less, none at once, and by rich.
PRINTED = {
    "much": "print('x' * 100_000)",
    "little": "print('x')",
    "unbuffered": "sys.stdout.reconfigure(write_through=True); print('x')",
    "tables": "show([Table('x', ['x'], rows=[['x']])])",
}


@pytest.mark.parametrize("printed", PRINTED)
def test_a_reader_that_leaves_early_ends_a_command_quietly(printed: str) -> None:
    done = without_reader(PRINTED[printed])
    assert (done.returncode, done.stderr) == (141, "")


def test_another_pipe_that_breaks_is_an_error() -> None:
    code = "raise BrokenPipeError(32, 'Broken pipe')"
    done = subprocess.run([sys.executable, "-c", SCRIPT, code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: [Errno 32] Broken pipe\n")


SCRIPT = """
import sys
from dit_engine.console.run import run_command
def command():
    if "show" in sys.argv[1]:
        from dit_bench.show.tables import Table, show
    exec(sys.argv[1])
    return 0
sys.exit(run_command(command))
"""


def without_reader(code: str) -> subprocess.CompletedProcess[str]:
    """A command that executes ``code`` and whose standard output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-c", SCRIPT, code]
        return subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)


def test_warnings_are_notes_while_loading_too(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load, sample = Engine.from_pretrained, Engine.generate

    def loud_load(*args: object, **options: object) -> Engine:
        warnings.warn("guessed\nthe heads", stacklevel=1)
        return load(*args, **options)

    def loud_sample(*args: object, **options: object) -> object:
        warnings.warn("memory is short", stacklevel=1)
        return sample(*args, **options)

    monkeypatch.setattr(Engine, "from_pretrained", loud_load)
    monkeypatch.setattr(Engine, "generate", loud_sample)
    arguments = ("-o", str(tmp_path / "sheet.png"))
    assert run(model, *arguments) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["note: guessed the heads", "note: memory is short"]
    assert run(model, *arguments, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_the_installed_command_prints_one_line(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dit_engine.cli.generate", "--model", str(model), "--labels",
               "99", "-o", str(tmp_path / "x.png")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: label 99 is out of range; allowed are 0 to 9\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--steps", "ten"],
            "invalid int value: 'ten' (see dit-bench quality --help)",
        ),
        (["--guidance-channels", "foo"], "'foo' is neither a number of latent channels"),
        (["--samples", "30"], "samples 30 is not a positive multiple of 16 classes"),
        (["--json", "missing/out.json"], "missing/out.json: the directory missing does not exist"),
    ],
)
def test_the_quality_command_likewise(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code: object = bench_main(["quality", "--model", "nowhere", *arguments])
    except SystemExit as stopped:
        code = stopped.code
    line = only_line(capsys)
    assert code == 2 and line.startswith("error: ") and message in line
    assert list(tmp_path.iterdir()) == []
