"""What all commands share: their help, streams, progress bars, waiting threads and exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dit_engine
from dit_bench.cli import main as bench
from dit_engine.cli.generate import main as generate
from dit_engine.console.bars import Bar
from dit_engine.console.run import SPINS, entry, run_command

ROOT = Path(str(dit_engine.__file__)).parents[1]


def on_screen(written: str) -> list[str]:
    """The lines that a terminal shows."""
    lines = []
    for line in written.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return [line for line in lines if line]


def test_an_option_is_written_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    """A new option could take the abbreviation of an old one in a script."""
    for main, words in ((generate, ["--label", "3"]), (bench, ["parity", "--sample", "2"])):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: unrecognized arguments: {words[-2]} {words[-1]} (see ")


def test_only_the_users_errors_are_caught(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> int:
        raise error

    for error, told in (
        (ValueError("two\nlines"), "two lines"),
        (torch.OutOfMemoryError("two\nlines"), "two lines"),
        (MemoryError(), "MemoryError"),
    ):
        assert run_command(lambda error=error: fail(error)) == 2
        assert capsys.readouterr() == ("", f"error: {told}\n")
    for ours in (RuntimeError("shapes differ"), TypeError("a bug"), AssertionError("a bug")):
        with pytest.raises(type(ours)):
            run_command(lambda ours=ours: fail(ours))

    @entry
    def interrupted_import() -> int:
        raise KeyboardInterrupt

    assert interrupted_import() == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("looped", [True, False])
def test_a_bar_is_wiped_away_when_the_command_fails(
    looped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> int:
        if looped:
            for i in Bar(range(4), "encoding", mininterval=0):
                if i == 2:
                    raise ValueError("a fault")
        with Bar(total=4, desc="sampling", mininterval=0) as bar:
            bar.update(2)
            raise ValueError("a fault")

    assert run_command(command) == 2
    told = capsys.readouterr().err
    assert "2/4" in told or "1/4" in told  # there was one
    assert on_screen(told) == ["error: a fault"]


SCRIPT = """
import os, sys
from contextlib import suppress
from dit_engine.console.output import write_stdout
from dit_engine.console.parser import Parser
from dit_engine.console.run import entry, output_is_a_file, run_command

def work(path, code):
    file = open(path, "wb")
    with suppress(OSError):
        os.write(1, b"from a library; ")  # lands in the file, if the file got the number 1
    file.write(b"the work")
    print("noise → image", file=sys.stderr)
    print("done →")
    exec(code)
    return 0

@entry
def main(argv=None):
    parser = Parser("made-up", "labels → images")
    parser.add_argument("path")
    parser.add_argument("--news", action="store_true")
    parser.add_argument("--code", default="")
    arguments = parser.parse_args(argv)
    if arguments.news:
        output_is_a_file()
    return run_command(lambda: work(arguments.path, arguments.code))

sys.exit(main())
"""


def shell(tmp_path: Path, redirected: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and error of SCRIPT with the shell's ``redirected``."""
    (tmp_path / "command.py").write_text(SCRIPT, encoding="utf-8")
    line = f'exec "$0" "$@" {redirected}'
    command = ["bash", "-c", line, sys.executable, str(tmp_path / "command.py"), *arguments]
    path = os.pathsep.join(str(ROOT / name) for name in ("", "benchmarks", "kernels"))
    env = {"PYTHONPATH": path, "LC_ALL": "C.UTF-8"}
    if redirected.startswith("encoding "):
        command, env = command[3:], env | {"PYTHONIOENCODING": redirected.split()[1]}
    done = subprocess.run(command, capture_output=True, env=env, timeout=60)
    told = done.stderr.decode("latin-1")
    assert "Traceback" not in told and "Exception ignored" not in told
    return done.returncode, done.stdout.decode("latin-1"), told


# What the streams are → the exit code where standard output is what was asked for.
STREAMS = {
    "encoding ascii": 0, ">&-": 0, "<&- >&- 2>&-": 0, "> /dev/full": 2, "2> /dev/full": 0,
    "> >(exec <&-; exit)": 141,
}  # fmt: skip


@pytest.mark.parametrize("redirected", STREAMS)
def test_closed_full_and_unread_streams(tmp_path: Path, redirected: str) -> None:
    made, expected = tmp_path / "made", (STREAMS[redirected], 0 if "exit" in redirected else None)
    code, out, err = shell(tmp_path, redirected, str(made), "--news")
    assert code == 0 and made.read_bytes() == b"the work"
    if redirected == "encoding ascii":
        assert (out, err) == ("from a library; done ?\n", "noise ? image\n")
    made.unlink()
    code, _, err = shell(tmp_path, redirected, str(made))
    assert code in expected and made.read_bytes() == b"the work"  # 0: the reader left too late
    if redirected == "> /dev/full":
        assert err.endswith("error: [Errno 28] No space left on device\n")
    assert shell(tmp_path, redirected, "--help")[0] in expected


@pytest.mark.parametrize(
    ("redirected", "code", "expected", "told"),
    [
        ("", "raise BrokenPipeError(32, 'Broken pipe')", 2, "error: [Errno 32] Broken pipe\n"),
        ("> /dev/full", "write_stdout(b'PNG')", 2,
         "error: standard output cannot be written: No space left on device\n"),
        ("> >(exec <&- true)", "print('x' * 100_000)", 141, ""),
        ("> >(exec <&- true)", "print('x')", 141, ""),
        ("> >(exec <&- true)", "write_stdout(b'PNG')", 141, ""),
    ],
)  # fmt: skip
def test_output_that_nobody_takes(
    tmp_path: Path, redirected: str, code: str, expected: int, told: str
) -> None:
    if "exec" in redirected:  # a pipe whose reader is gone for certain
        code = f"import time; time.sleep(0.5); {code}"
    arguments = (str(tmp_path / "made"), "--code", code)
    found, _, err = shell(tmp_path, redirected, *arguments)
    assert (found, err) == (expected, f"noise → image\n{told}".encode().decode("latin-1"))


@pytest.mark.slow
def test_commands_start_without_torch_and_let_threads_sleep() -> None:
    """Unless the environment says how threads wait."""
    code = """
import contextlib, io, os, sys
from importlib import import_module
for given, spins in ({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "x"}, None):
    for name, words in (("dit_engine.cli.generate", "--help"), ("dit_bench.cli", "no-such-word"),
                        ("dit_export.cli", "--version")):
        main = import_module(name).main
        assert "torch" not in sys.modules, name
        os.environ.pop("GOMP_SPINCOUNT", None)
        os.environ.update(given)
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            main([words])
        assert os.environ.get("GOMP_SPINCOUNT") == spins, (name, given)
"""
    code = code.replace("SPINS", repr(SPINS))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
