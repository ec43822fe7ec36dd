"""Outputs hold the names of files, not their paths."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from tiny import NAMES, tiny_dit, tiny_vae

import dit_engine
from dit_bench.cli import main as bench
from dit_bench.models_command import add_arguments, plan_of
from dit_engine.checkpoint import save_pretrained
from dit_engine.cli import generate as command
from dit_engine.cli.generate import main as generate
from dit_engine.console.parser import Parser
from dit_engine.io.provenance import is_source, recorded, same_source, without_paths
from dit_engine.training import run
from dit_engine.training.loop import Budget

for part in ("bench", "export"):
    sys.path.append(str(Path(__file__).resolve().parents[1] / part))
made_up, exports = import_module("made_up"), import_module("exports")

SECRET = "home of alice"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a secret name that holds a model with a VAE."""
    path = tmp_path_factory.mktemp("machine") / SECRET
    save_pretrained(path / "tiny", tiny_dit(), tiny_vae(), NAMES)
    return path


def options(home: Path, *more: object) -> list[str]:
    given = ("--model", home / "tiny", "--labels", 1, 2, "--steps", 1, "--seed", 3, "--quiet")
    return [*map(str, (*given, *more))]


def told(path: Path) -> dict:
    with Image.open(path) as image:
        return json.loads(image.info["dit_engine"])


def test_pictures_and_latents(home: Path, tmp_path: Path) -> None:
    vae = ["--vae", home / "tiny"]
    for output in ("sheet.png", "one", "z.safetensors"):
        assert generate(options(home, *vae, "-o", tmp_path / output)) == 0
    for path in (tmp_path / "sheet.png", *(tmp_path / "one").iterdir()):
        record = told(path)
        assert (record["model"], record["vae"]) == ("tiny", "tiny")
    with safe_open(tmp_path / "z.safetensors", "pt") as file:
        assert json.loads(file.metadata()["dit_engine"])["model"] == "tiny"
    for path in tmp_path.rglob("*.*"):
        assert SECRET.encode() not in path.read_bytes(), path


def test_a_directory_of_pictures_with_paths_is_continued(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures of earlier versions have paths too."""
    assert generate(options(home, "-o", tmp_path / "out", "--record-paths")) == 0
    path = next((tmp_path / "out").iterdir())
    assert told(path)["model"] == str(home / "tiny")
    written = options(home, "-o", tmp_path / "out")
    written.remove("--quiet")
    assert generate(written) == 0
    assert "2 of 2 were there" in capsys.readouterr().out


def picture(path: Path, **values: object) -> Path:
    record = {"noise": "per-image", "label": 1, "seed": 3, "steps": 1, "guidance_scale": 1.0}
    info = PngInfo()
    info.add_text("dit_engine", json.dumps(record | values))
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return path


def test_a_picture_does_not_choose_what_is_loaded(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(command, "load_engine", lambda arguments: asked.append(arguments.model))
    for values in (
        {"model": str(home / "tiny")},
        {"model": "owner/name"},
        {"model": "builtin", "vae": "owner/name"},
    ):
        path = picture(tmp_path / "a.png", **values)
        assert generate(["--like", str(path), "-o", str(tmp_path / "b.png")]) == 2
        err = capsys.readouterr().err
        option = "--vae" if "vae" in values else "--model"
        assert f"give it with {option}, since a picture does not choose what is loaded" in err
    assert asked == []


def test_earlier_pictures_are_made_again_with_their_model(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a model of the same name in another place. If the name differs, settings that belong to
    the model are not used."""
    path = picture(tmp_path / "a.png", model="/gone/tiny", num_heads=4, numerics="official")
    like = ["--like", str(path), "-o", str(tmp_path / "b.png"), "--model"]
    assert generate([*like, str(home / "tiny")]) == 0
    assert told(tmp_path / "b.png")["num_heads"] == 4
    save_pretrained(home / "renamed", tiny_dit(), tiny_vae(), NAMES)
    capsys.readouterr()
    assert generate([*like, str(home / "renamed")]) == 0
    assert "num_heads" not in told(tmp_path / "b.png")
    assert "made with another model, '/gone/tiny': these settings" in capsys.readouterr().err


def test_exports_hold_no_paths() -> None:
    """Neither those of the code and its libraries, nor that of the export itself."""
    bundle = exports.exported("fp32", "conditioner")
    code, libraries = (Path(module.__file__ or "").parents[1] for module in (dit_engine, np))
    secrets = [str(code), str(libraries), str(bundle.path.parent)]
    assert any(path.suffix == ".onnx" for path in bundle.path.iterdir())
    for path in bundle.path.iterdir():
        data = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in data], path.name


def test_settings_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training is resumed after its images were moved, or if its settings have their path."""

    def begin(images: Path) -> None:
        for name in "ab":
            (images / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16)).save(images / name / "1.png")
        settings = run.TrainSettings(data=str(images), size=16)
        with pytest.raises(SystemExit):
            run.train(settings, Budget(steps=1), Budget(steps=1), tmp_path / "run")

    monkeypatch.setattr(run, "_stage_one", lambda *_: sys.exit())
    path = tmp_path / "run" / "settings.json"
    begin(tmp_path / SECRET / "images")
    text = path.read_text()
    assert SECRET not in text and '"data": "images"' in text
    path.write_text(text.replace('"images",', f'"/{SECRET}/images",'))
    begin(tmp_path / "moved" / "images")


def test_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reports that are loaded and written again. Two models with the same name are refused."""
    report = made_up.report()
    path = f"/{SECRET}/models/tiny"
    report["command"] = ["--model", path, f"--json=/{SECRET}/a.json", "--batch", "1"]
    for row in (*report["models"], *report["rows"]):
        row["model"] = path if row["model"] == "S/8" else row["model"]
    report["models"][0]["weights"] = path
    report["rows"][-1]["reason"] = f"[Errno 2] No such file: '/{SECRET}/lib.so'"
    old = tmp_path / "old.json"
    old.write_text(json.dumps(report))
    names = [tmp_path / f"new.{kind}" for kind in ("json", "csv", "html")]
    outputs = [f"--{path.suffix[1:]}={path}" for path in names]
    assert bench(["--load", str(old), *outputs, "--compare", str(old)]) == 0
    assert SECRET not in capsys.readouterr().out
    for written in names:
        assert SECRET not in written.read_text() and "tiny" in written.read_text()
    made = json.loads(names[0].read_text())
    assert made["command"] == ["--model", "tiny", "--json=a.json", "--batch", "1"]
    assert {model["model"] for model in made["models"]} == {"tiny", "S/4"}
    assert made["rows"][-1]["reason"] == "[Errno 2] No such file: 'lib.so'"
    twice = [str(tmp_path / side / "model") for side in "ab"]
    for each in twice:
        Path(each).mkdir(parents=True)
    parser = Parser("dit-bench", "")
    add_arguments(parser)
    with pytest.raises(ValueError, match="a/model' has the name of another model: give --record"):
        plan_of(parser.parse_args(["--model", *twice]))


def test_names_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    names = {
        "builtin": "builtin", "facebook/DiT-XL-2-256": "facebook/DiT-XL-2-256",
        "models/tiny": "tiny", "./models/none": "none", ".": tmp_path.name,
        "models/..": tmp_path.name, "~/a.pt": "a.pt", "/a b/c d.pt": "c d.pt",
    }  # fmt: skip
    assert {source: recorded(source) for source in names} == names
    assert is_source("models/tiny", "/elsewhere/tiny") and not is_source("models/tiny", "other")
    assert same_source(r"C:\Users\alice\a.pt", "a.pt") and not same_source("a.pt", "b.pt")


def test_texts_lose_only_directories() -> None:
    kept = ["lean/bf16, 3 GB/s", "triton://host:8000/v2/x", "see https://a.b/c/d.", "1 / 2",
            "runs/own/model", "a\\b", "and/or/both", 3, None]  # fmt: skip
    assert without_paths(kept) == kept
    cut = {
        "~/a b/c.pt": "c.pt", r"D:\alice\c.pt": "c.pt", "../x/y": "y",
        "'/data/alice b/c d' is no model": "'c d' is no model", "(/a/b/c)": "(c)",
        "--json=/data/alice/a.json": "--json=a.json", "/data/alice/x: is bad": "x: is bad",
    }  # fmt: skip
    assert without_paths({"deep": [*cut]}) == {"deep": [*cut.values()]}
