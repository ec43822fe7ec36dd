"""Text from others is printed with its terminal escapes visible, and otherwise unchanged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import NAMES, tiny_dit, tiny_vae

from dit_bench.cli import main as bench
from dit_bench.progress import Progress
from dit_engine.checkpoint import save_pretrained
from dit_engine.cli.generate import main as generate
from dit_engine.console.bars import Bar
from dit_engine.engine import Engine
from dit_engine.io.printable import first_line, one_line, printable, say
from dit_export.cli import main as export
from dit_export.server import process

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
made_up = import_module("made_up")

Main = Callable[[list[str]], int]

ACTING = {
    "a\rb\bc \x1b]0;owned\x07": r"a\rb\x08c \x1b]0;owned\x07",
    "joined\u200dwith\u200cnothing": r"joined\u200dwith\u200cnothing",
    "\u200d": r"\u200d",
    "\u3164\u034f": r"\u3164\u034f",
}
HARMLESS = (
    r"C:\models\x1b",
    "Caf\u00e9, e\u0301",  # composed and not
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u0915\u094d\u200d\u0937",  # Persian, Hindi
    "\U0001f469\U0001f3fd\u200d\U0001f52c 1\ufe0f\u20e3 \u2764\ufe0f",  # emoji
    "«a\u00a0b» ½ · √2 → ∞",
)


def test_what_acts_on_a_terminal_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    """Single characters are compared with Unicode's categories."""
    for text, shown in ACTING.items():
        assert printable(text) == shown
    for text in HARMLESS:
        assert printable(text) == text
    for i in (*range(0x20000), *range(0xE0000, 0xE1000)):
        shown = printable(chr(i))
        if unicodedata.category(chr(i)) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Cn", "Co"):
            assert shown.isascii() and shown.startswith("\\") and shown.isprintable(), hex(i)
        else:
            assert shown == chr(i) or unicodedata.category(chr(i)) in ("Lo", "Mn"), hex(i)
    assert one_line("a\n b\t\x1bc") == r"a b \x1bc"
    assert len(one_line("long " * 10_000)) <= 2000
    assert first_line(ValueError("\nfirst\x1b[2J\nsecond")) == r"first\x1b[2J"
    say("one\x1b[1m\ntwo\r")
    assert capsys.readouterr().out == "one\\x1b[1m\ntwo\\r\n"


HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e[red]name\r"


def shown_by(capture: pytest.CaptureFixture[str], code: int, main: Main, *options: object) -> str:
    """What a command prints: names, escaped; only newlines and a bar's return act on a terminal."""
    capture.readouterr()
    assert main([*map(str, options)]) == code
    out, err = capture.readouterr()
    for text in (out, err.replace("\r", "").replace("\x1b[A", "")):
        assert all(printable(line) == line for line in text.split("\n")), ascii(text)
    told = out + err
    assert r"x1b]0;owned\x07" in told.replace(r"\\", "\\"), told
    assert "[red]" in told or "…" in told  # and nothing is taken for markup
    return told


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    names = [f"{HOSTILE}\nsecond line {i % 5}" for i in range(len(NAMES))]
    save_pretrained(path, tiny_dit(), tiny_vae(), names)
    return path


def test_names_of_labels(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = shown_by(capsys, 0, generate, "--model", model, "--list-labels")
    assert listed.count("\n") == len(NAMES) + 1  # a note on names that several have
    shown_by(capsys, 2, generate, "--model", model, "--labels", "none")
    shown_by(capsys, 2, generate, "--model", model, "--labels", f"{HOSTILE}\nsecond line 1")


def config_of(path: Path, **values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def header(path: Path, name: str) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 99]}
    text = json.dumps({name: entry}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def shard(path: Path) -> None:
    (path / "model.safetensors").unlink()
    config_of(path / "model.safetensors.index.json", weight_map={"a": f"{HOSTILE}.safetensors"})


def scheduler(path: Path) -> None:
    path.rename(path.with_name("transformer"))
    path.mkdir()
    path.with_name("transformer").rename(path / "transformer")
    config_of(path / "model_index.json", _class_name="DiTPipeline", scheduler=["diffusers", "x"])
    config_of(path / "scheduler" / "scheduler_config.json", _class_name=HOSTILE)


def pickled(path: Path, content: object) -> None:
    """A checkpoint of this content, or of these instructions, in the place of the directory."""
    shutil.rmtree(path)
    if isinstance(content, bytes):
        path.with_suffix(".pt").write_bytes(content)
    else:
        torch.save(content, path.with_suffix(".pt"))


STATE = tiny_dit(hidden_size=64, num_heads=1).state_dict()
# What a stranger does to a model.
BAD_MODELS: dict[str, Callable[[Path], object]] = {
    "class": lambda path: config_of(path / "config.json", _class_name=HOSTILE),
    "pipeline": lambda path: config_of(path / "model_index.json", _class_name=HOSTILE),
    "tensor": lambda path: save_file(
        STATE | {f"{HOSTILE}.weight": torch.zeros(1, 1)}, path / "model.safetensors"
    ),
    "header": lambda path: header(path / "model.safetensors", HOSTILE),
    "shard": shard,
    "scheduler": scheduler,
    "option": lambda path: pickled(
        path, {"model": STATE, "args": {"model": f"SiT-XL/2 {HOSTILE}"}}
    ),
    # The name of a global, which pickles read as ASCII.
    "global": lambda path: pickled(path, b"\x80\x02cos\n%b\n." % HOSTILE.encode("ascii", "ignore")),
}


@pytest.mark.parametrize("bad", BAD_MODELS)
def test_what_a_models_files_say(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_pretrained(path, tiny_dit(hidden_size=64, num_heads=1))
    BAD_MODELS[bad](path)
    with pytest.raises((ValueError, OSError)) as raised:
        Engine.from_pretrained(path if path.exists() else path.with_suffix(".pt"))
    told = str(raised.value)
    assert told.isprintable()
    if bad != "header":  # the reader of safetensors may not quote it
        assert r"x1b]0;owned\x07" in told.replace(r"\\", "\\")


def test_notes_and_names_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = tmp_path / f"{HOSTILE} model", tmp_path / f"{HOSTILE}\nforged.safetensors"
    save_pretrained(folder, tiny_dit())
    scheduler(folder)
    config_of(
        folder / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler", **{HOSTILE: 1}
    )
    options = ["--labels", "1", "--steps", "1", "--seed", "1", "--model", folder, "-o", output]
    for _ in range(2):  # the second time it is replaced, with a note
        told = shown_by(capsys, 0, generate, *options)
        assert r"\nforged" in told and "\nforged" not in told


def test_reports_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = made_up.report()
    report["models"][0]["model"] = report["settings"]["sampler"] = HOSTILE
    report["machine"]["cpu"] = HOSTILE
    for row in report["rows"]:
        row["model"] = row["case"] = f"{HOSTILE}\n"
        row["contender"] = f"{HOSTILE} {row['contender']}"
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    for more in ([], ["--wide"], ["--csv", "-"]):
        shown_by(capsys, 0, bench, "--load", path, *more)
    assert bench(["--load", str(path), "--json", "-"]) == 0
    shown = capsys.readouterr().out
    assert all(printable(line) == line for line in shown.split("\n"))
    assert json.loads(shown)["settings"]["sampler"] == HOSTILE
    report["schema"] = HOSTILE
    path.write_text(json.dumps(report))
    shown_by(capsys, 2, bench, "--load", path)
    shown_by(capsys, 2, bench, "--model", HOSTILE)


def test_manifests_of_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, repository = tmp_path / "export", tmp_path / "repository"
    config_of(path / "manifest.json", format=HOSTILE, producer="dit-engine", files={})
    shown_by(capsys, 2, export, "triton", "--onnx", path, "-o", repository)
    repository.mkdir()
    (repository / HOSTILE).touch()
    shown_by(capsys, 2, export, "triton", "--onnx", path, "-o", repository)


def test_what_a_server_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    log.write_bytes(HOSTILE.replace("\r", "").encode() + b"\xff\n")
    with process._output(None) as descriptor:
        subprocess.run(["cat", str(log)], stdout=descriptor, check=True)
    told = capsys.readouterr().err
    assert told.count("owned") == told.count("\n") == 1
    assert all(printable(line) == line for line in told.split("\n"))


def test_bars(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar(total=2, desc=HOSTILE) as bar:
        bar.update()
        bar.set_description(HOSTILE)
        bar.set_description_str(HOSTILE)
    progress = Progress()
    with progress.run(2):
        progress.stage(HOSTILE)
        progress.say(HOSTILE)
    told = capsys.readouterr().err.replace("\r", "").replace("\x1b[A", "")
    assert all(printable(line) == line for line in told.split("\n")), ascii(told)
