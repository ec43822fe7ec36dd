"""dit-generate: the same images as Engine.generate, files that tell how they were made, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import NAMES, tiny_dit, tiny_vae

from dit_engine import Engine, __version__
from dit_engine.checkpoint import save_pretrained
from dit_engine.cli.generate import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_pretrained(path, tiny_dit(), tiny_vae(), NAMES)
    return path


@pytest.fixture(scope="module")
def bare_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "bare"
    save_pretrained(path, tiny_dit())
    return path


def run(model: Path, *arguments: str) -> int:
    return main(["--model", str(model), "--steps", "3", "--device", "cpu", *arguments])


def test_files_hold_the_engines_images_and_how_to_make_them(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    options = ("--sampler", "ddim", "--eta", "0.5", "--guidance-scale", "2.5", "--seed", "40")
    assert run(model, "--labels", "cat", "7", "-o", str(out), *options) == 0
    engine = Engine.from_pretrained(model, device="cpu")
    expected = engine.generate(
        ["cat", 7], steps=3, sampler="ddim", eta=0.5, guidance_scale=2.5, seed=40, output="np"
    ).images
    files = sorted(out.iterdir())
    assert [f.name for f in files] == ["00000-cat-seed40.png", "00001-hen-seed41.png"]
    for i, file in enumerate(files):
        with Image.open(file) as image:
            assert np.array_equal(np.asarray(image), expected[i])
            record = json.loads(image.text["dit_engine"])
        assert record["label"] == [2, 7][i] and record["seed"] == 40 + i
        assert record["version"] == __version__ and record["model"] == str(model)
        again = engine.generate(
            record["label"], seed=record["seed"], output="np",
            **{k: record[k] for k in ("steps", "sampler", "eta", "guidance_scale", "precision",
                                      "guidance_channels", "guidance_interval", "noise")},
        ).images[0]  # fmt: skip
        assert np.array_equal(again, expected[i])


def test_a_sheet_is_one_captioned_picture(model: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    labels = ["ant", "bee", "cat"]
    assert run(model, "--labels", *labels, "-o", str(sheet), "--columns", "3", "--seed", "1") == 0
    with Image.open(sheet) as image:
        assert image.width > 3 * 128 and 128 < image.height < 2 * 128
        record = json.loads(image.text["dit_engine"])
        assert image.text["sampler"] == "ddpm" and json.loads(image.text["seeds"]) == [1, 2, 3]
    assert record["labels"] == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]


def test_latents_of_a_model_without_vae(bare_model: Path, tmp_path: Path) -> None:
    assert (
        run(bare_model, "--labels", "1", "-o", str(tmp_path / "z.safetensors"), "--seed", "2") == 0
    )
    latents = load_file(tmp_path / "z.safetensors")["latents"]
    engine = Engine.from_pretrained(bare_model, device="cpu")
    assert torch.equal(latents, engine.generate(1, seed=2, steps=3).images)


def test_given_noise(model: Path, tmp_path: Path) -> None:
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    np.save(tmp_path / "z.npy", z.numpy())
    out = tmp_path / "out"
    arguments = ("--labels", "3", "--sampler", "dpm++", "--latents", str(tmp_path / "z.npy"))
    assert run(model, *arguments, "-o", str(out), "--seed", "0") == 0
    engine = Engine.from_pretrained(model, device="cpu")
    expected = engine.generate(3, steps=3, sampler="dpm++", latents=z, output="np").images[0]
    with Image.open(next(out.iterdir())) as image:
        assert np.array_equal(np.asarray(image), expected)


def test_list_labels(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "--list-labels") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [[str(i), n] for i, n in enumerate(NAMES)]


BAD = [
    (["--labels", "unicorn"], "label 'unicorn' is unknown"),
    (["--labels", "10"], "label 10 is out of range; allowed are 0 to 9"),
    ([], "--labels is missing"),
    (["--labels", "1", "--steps", "0"], "steps 0 is not a whole number from 1 to 1000"),
    (["--labels", "1", "--steps", "1001"], "steps 1001"),
    (["--labels", "1", "--guidance-interval", "5", "1"], "upside down"),
    (["--labels", "1", "--backend", "magic"], "backend 'magic' is unknown"),
    (["--labels", "1", "--latents", "nowhere.npy"], "nowhere.npy does not exist"),
    (["--labels", "1", "-o", "missing/sheet.png"], "missing"),
    (["--labels", "1", "-o", "sheet.jpg"], "sheet.jpg"),
    (["--labels", "1", "--model", "nowhere.pt"], "nowhere.pt"),
    (["--labels", "1", "--columns", "0"], "columns 0"),
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
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last and "Traceback" not in last
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here first")
    for output in (tmp_path / "file", tmp_path / "file" / "sheet.png", "/proc/sheet.png"):
        assert run(model, "--labels", "1", "-o", str(output)) == 2
    assert (tmp_path / "file").read_text() == "here first"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_the_installed_command_prints_no_traceback(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dit_engine.cli.generate", "--model", str(model), "--labels",
               "99", "-o", str(tmp_path / "x.png")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "error: label 99 is out of range; allowed are 0 to 9"
