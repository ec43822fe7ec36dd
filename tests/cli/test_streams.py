"""Commands on standard streams that are closed, full, without a reader, or not in UTF-8."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import dit_bench
import dit_engine.cli
import dit_export
from dit_engine.console.run import entry

SCRIPT = """
import os, sys
from contextlib import suppress
from dit_engine.console.parser import Parser
from dit_engine.console.run import entry, output_is_a_file, run_command

def work(path):
    file = open(path, "wb")
    with suppress(OSError):
        os.write(1, b"from a library; ")  # lands in the file, if the file got the number 1
    file.write(b"the work")
    print("noise → image", file=sys.stderr)
    print("done →")
    return 0

@entry
def main(argv=None):
    parser = Parser("made-up", "labels → images")
    parser.add_argument("path")
    parser.add_argument("--news", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.news:
        output_is_a_file()
    return run_command(lambda: work(arguments.path))

sys.exit(main())
"""


def shell(tmp_path: Path, redirected: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and error of the command with the shell's ``redirected``."""
    (tmp_path / "command.py").write_text(SCRIPT, encoding="utf-8")
    line = f'exec "$0" "$@" {redirected}'
    command = ["bash", "-c", line, sys.executable, str(tmp_path / "command.py"), *arguments]
    env = {"PYTHONPATH": str(Path(dit_engine.cli.__file__).parents[2]), "LC_ALL": "C.UTF-8"}
    if redirected.startswith("encoding "):
        command, env = command[3:], env | {"PYTHONIOENCODING": redirected.split()[1]}
    done = subprocess.run(command, capture_output=True, env=env, timeout=60)
    return done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1")


# What the streams are → exit code where standard output is what was asked for.
STREAMS = {
    "encoding ascii": 0, "encoding latin-1": 0, "encoding cp1252": 0,
    ">&-": 0, "2>&-": 0, "<&- >&- 2>&-": 0, ">&- 2>&-": 0,
    "> /dev/full": 2, "2> /dev/full": 0, "> /dev/full 2> /dev/full": 2,
    "> >(exec <&-; exit)": 141,
}  # fmt: skip


@pytest.mark.parametrize("redirected", STREAMS)
def test_the_work_is_done(tmp_path: Path, redirected: str) -> None:
    made = tmp_path / "made"
    code, out, err = shell(tmp_path, redirected, str(made), "--news")
    assert code == 0 and "Traceback" not in err and "Exception ignored" not in err
    assert made.read_bytes() == b"the work"
    if redirected == "encoding ascii":
        assert (out, err) == ("from a library; done ?\n", "noise ? image\n")
    made.unlink()
    code, _, err = shell(tmp_path, redirected, str(made))
    assert made.read_bytes() == b"the work"
    assert code == STREAMS[redirected] or (code == 0 and STREAMS[redirected] == 141)  # a race
    assert "Traceback" not in err and "Exception ignored" not in err
    if redirected == "> /dev/full":
        assert err.endswith("error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("redirected", STREAMS)
def test_help_and_errors_of_the_parser(tmp_path: Path, redirected: str) -> None:
    code, _, err = shell(tmp_path, redirected, "--help")
    assert code == STREAMS[redirected] or (code == 0 and STREAMS[redirected] == 141)
    assert "Traceback" not in err and "Exception ignored" not in err
    assert shell(tmp_path, redirected, "--unknown")[0] == 2


def test_every_command_is_started_so() -> None:
    plain = {"client.py", "supervisor.py"}  # of the standard library alone; run elsewhere
    found = 0
    for package in (dit_engine.cli, dit_export, dit_bench):
        for path in Path(str(package.__file__)).parent.rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            if 'if __name__ == "__main__":' in source and path.name not in plain:
                assert re.search(r"^@entry\ndef main\(", source, re.MULTILINE), path
                found += 1
    assert found >= 4


def test_ctrl_c_while_a_command_imports_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    @entry
    def main() -> int:
        raise KeyboardInterrupt

    assert main() == 130
    assert capsys.readouterr().err == "interrupted\n"
