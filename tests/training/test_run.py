"""dit-train end to end on a small folder of images: both stages, resumption, bad input."""

from __future__ import annotations

import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dit_engine import Engine
from dit_engine.cli import train as command
from dit_engine.cli.train import main
from dit_engine.training import run
from dit_engine.training.card import NOISE_GUESS_MSE, Outcome, judge, write_card
from dit_engine.training.data import ImageSet, load_image_folder
from dit_engine.training.loop import Stage
from dit_engine.training.loss import DiffusionLoss
from dit_engine.training.run import TrainSettings
from dit_engine.training.stopping import Stopped

SMALL = [
    "--size", "16", "--vae-channels", "8", "16", "--depth", "1", "--hidden-size", "32",
    "--num-heads", "2", "--batch-size", "4", "--vae-batch-size", "4", "--vae-steps", "3",
    "--dit-steps", "3", "--device", "cpu",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten noisy images of two classes, dark and light."""
    random = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(5):
            pixels = random.integers(level - 30, level + 30, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors") | load_file(next(path.glob("vae/*.safetensors")))


def test_a_run_from_its_images_to_a_model_and_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["--data", str(folder), "-o", str(out), "--flip", "dark", *SMALL]
    assert main(arguments) == 0
    told = capsys.readouterr()
    # Three steps do not train a model.
    assert "loads the model, which is not trained" in told.out
    (note,) = [line for line in told.err.splitlines() if "note: " in line]
    assert "model is not trained: the transformer took 3 steps" in note
    assert "the autoencoder took 3 steps" in note
    card = (out / "model" / "README.md").read_text()
    assert "**This model is not trained**: the transformer took 3 steps" in card
    engine = Engine.from_pretrained(out / "model", device="cpu", check_finite=True)
    assert engine.label_names == ("dark", "light") and engine.image_size == 16
    assert engine.generate(["light"], steps=2, seed=0).images[0].size == (16, 16)
    for stage, step in (("vae", 3), ("dit", 3)):
        assert (out / stage / f"sheet-{step:06d}.png").is_file()
        assert torch.load(out / stage / "last.pt", weights_only=True)["step"] == step
    # Finished stages are not trained again: the same weights come out.
    before = weights_of(out / "model")
    assert main(arguments) == 0
    after = weights_of(out / "model")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # A decoder that is trained on leaves the encoder and the transformer as they are.
    assert main([*arguments, "--decoder-steps", "2"]) == 0
    after = weights_of(out / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    assert torch.load(out / "decoder" / "last.pt", weights_only=True)["step"] == 2
    # Only the settings that it began with go on.
    capsys.readouterr()
    assert main([*arguments, "--depth", "2"]) == 2
    assert "holds a training with depth 1, not 2" in capsys.readouterr().err
    (folder / "aaa").mkdir()  # a class before the others would shift every label
    Image.new("RGB", (16, 16)).save(folder / "aaa" / "0.png")
    assert main(arguments) == 2
    assert "holds a training with class_names ['dark', 'light'], not" in capsys.readouterr().err


def raising(error: BaseException) -> Callable[..., object]:
    def call(*_: object) -> object:
        raise error

    return call


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Stopped("", signal.SIGTERM)])
def test_what_is_interrupted_between_checkpoints_says_how_to_go_on(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
) -> None:
    out = tmp_path / "run"
    arguments = ["--data", str(folder), "-o", str(out), *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(run, "load_image_folder", raising(error))
        assert main(arguments) == (143 if isinstance(error, Stopped) else 130)
    assert capsys.readouterr().err == "stopped before anything was kept\n" and not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(run, "encode_all", raising(error))
        assert main(arguments) == (143 if isinstance(error, Stopped) else 130)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("stopped between two checkpoints; the same command again goes on")
    if isinstance(error, Stopped):
        assert main(arguments) == 0


@pytest.mark.slow
def test_sigterm_is_answered_with_a_checkpoint_and_the_run_goes_on(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "dit_engine.cli.train", "--data", str(folder), "-o", str(out),
               *SMALL, "--dit-steps", "100000"]  # fmt: skip
    log = out / "dit" / "log.csv"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not log.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 143
    match = re.search(r"transformer: stopped after (\d+) steps, saved; the same command", told)
    assert match is not None and "Traceback" not in told
    step = int(match[1])
    assert step >= 50 and torch.load(out / "dit/last.pt", weights_only=True)["step"] == step
    arguments = ["--data", str(folder), "-o", str(out), *SMALL, "--dit-steps", str(step + 5)]
    assert main(arguments) == 0
    assert torch.load(out / "dit/last.pt", weights_only=True)["step"] == step + 5


def test_bad_input_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["--device", "foo"], "device 'foo' is not available; allowed: cpu"),
        (["--threads", "0"], "threads 0 is not a positive integer"),
        (["--data", "nowhere"], "image folder nowhere is not a directory"),
        (["--size", "15"], "size 15 is not a multiple of"),
        (["--num-heads", "5"], "is not a multiple of num_heads 5"),
        (["--batch-size", "0"], "batch_size 0 is not a positive integer"),
        (["--vae-channels", "12"], "12 is not a positive multiple of norm_num_groups 8"),
        (["--dit-steps", "0"], "budget of 0"),
        (["--dit-minutes", "nan"], "nan is not above 0"),
        (["--decoder-steps", "0"], "0 is not above 0"),
        (["--depth", "many"], "--depth: invalid int value: 'many' (see dit-train --help)"),
        (["--epochs", "3"], "--epochs 3 (see dit-train --help)"),
        (["--dit-steps", "3", "--dit-minutes", "3"], "not allowed with"),
        (["--data", str(folder), "--size", "16", "--flip", "drk"],
         "flip: label 'drk' is unknown; did you mean 'dark'?"),
    ):  # fmt: skip
        try:
            code: object = main(["-o", "run", *arguments])
        except SystemExit as stopped:
            code = stopped.code
        error = capsys.readouterr().err
        assert code == 2 and error.count("\n") == 1 and error.endswith("\n"), error
        assert error.startswith("error: ") and message in error, error
        assert not Path("run").exists()  # so that the corrected command is not refused
    path = Path("run/settings.json")
    path.parent.mkdir()
    for text, message in (
        ("{}", "class_names None is not a list of names"),
        ("{", "not valid JSON (Expecting property name"),
        ("[]", "holds a list, not a JSON object"),
        ('{"class_names": [1]}', "class_names [1] is not a list of names"),
    ):
        path.write_text(text)
        assert main(["--data", str(folder), "-o", "run", *SMALL]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {path}: {message}") and error.count("\n") == 1
    (folder / "dark" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"broken\.png is not a readable image \(cannot identify"):
        load_image_folder(folder, 16)
    (folder / "dark" / "broken.png").unlink()
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="class 'empty' holds no images"):
        load_image_folder(folder, 16)


def test_options_reach_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    helps = {a.dest: a.help for a in command.build_parser()._actions}
    assert {field.name for field in fields(TrainSettings)} == set(command._HELP)
    assert all(helps.values()) and len(set(helps.values())) == len(helps)
    calls = []

    def record(*args: object) -> tuple[Path, Outcome]:
        calls.append(args)
        return tmp_path / "model", Outcome({}, ())

    monkeypatch.setattr(run, "train", record)
    arguments = ["-o", str(tmp_path), "--device", "cpu", "--vae-steps", "7", "--dit-minutes", "0.5",
                 "--decoder-steps", "2", "--vae-channels", "8", "16", "--flip", "ant", "bee",
                 "--kl-weight", "0.5"]  # fmt: skip
    assert main(arguments) == 0
    ((settings, vae_budget, dit_budget, directory, device, decoder_budget),) = calls
    assert settings == TrainSettings(vae_channels=(8, 16), flip=("ant", "bee"), kl_weight=0.5)
    assert (vae_budget.steps, vae_budget.minutes) == (7, None)
    assert (dit_budget.steps, dit_budget.minutes) == (None, 0.5)
    assert (decoder_budget.steps, decoder_budget.minutes) == (2, None)
    assert (directory, device) == (tmp_path, torch.device("cpu"))
    assert str(tmp_path / "model") in capsys.readouterr().out


# Two colours, black and white by halves: in [-1, 1] every pixel is 1 from their mean.
DATA = ImageSet(
    np.repeat(np.array([0, 255], np.uint8), 8 * 8 * 3 * 4).reshape(8, 8, 8, 3),
    np.zeros(8, int),
    ("a",),
)
DIT = Stage(5000, 3600.0, {"loss": 0.05, "mse": 0.04})
VAE = Stage(3000, 1800.0, {"loss": 0.1, "pixel": 0.03})


def test_the_guess_that_knows_nothing_of_the_images() -> None:
    """Its error in the loss that training reports, for latents of N(0, 1), is the closed form's."""
    generator = torch.Generator().manual_seed(0)
    loss = DiffusionLoss()
    t = torch.arange(1000).repeat(8)
    x0, noise = (torch.randn(len(t), 4, 8, 8, generator=generator) for _ in range(2))

    def guess(xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return loss.sqrt_one_minus_bar[t].view(-1, 1, 1, 1) * xt

    assert float(loss(guess, x0, t, noise)["mse"]) == pytest.approx(NOISE_GUESS_MSE, rel=3e-3)
    # And no other multiple of x_t is better.
    for factor in (0.95, 1.05):
        other = loss(lambda xt, t, f=factor: f * guess(xt, t), x0, t, noise)["mse"]
        assert float(other) > NOISE_GUESS_MSE


def test_what_is_plainly_not_trained() -> None:
    few, unknown = Stage(120, 1.0, {"loss": 0.1, "mse": 0.1}), Stage(5000, 1.0, {})
    for transformer, autoencoder, decay, message in (
        (DIT, VAE, 0.999, ""),
        (None, None, 0.999, ""),
        (unknown, replace(unknown, step=3000), 0.999, ""),  # old checkpoints know no losses
        (few, VAE, 0.99, ""),  # few steps are many where the average is short
        (replace(DIT, step=41), VAE, 0.999, "the transformer took 41 steps, and its weights"),
        (replace(DIT, losses={"mse": 0.3}), VAE, 0.999, "error, 0.3, is not below the 0.276"),
        (replace(DIT, losses={"mse": math.nan}), VAE, 0.999, "error, nan, is not below"),
        (DIT, replace(VAE, step=499), 0.999, "the autoencoder took 499 steps, and its weights are"),
        (DIT, replace(VAE, losses={"pixel": 1.01}), 0.999, "error, 1.01, is not below the 1"),
    ):
        found = judge(DATA, transformer, autoencoder, decay, 0.998).shortcomings
        assert len(found) == bool(message) and message in "".join(found)
    plain = ImageSet(np.full((4, 8, 8, 3), 200, np.uint8), np.zeros(4, int), ("a",))
    stage = Stage(5000, 1.0, {"pixel": 0.004})  # of images of one colour
    assert judge(plain, DIT, stage, 0.999, 0.998).shortcomings == ()


def test_the_card_says_it_and_leaves_another_s_card(tmp_path: Path) -> None:
    untrained = judge(DATA, Stage(41, 360.0, {"loss": 0.9, "mse": 0.87}), VAE, 0.999, 0.998)
    write_card(tmp_path, DATA, untrained)
    text = (tmp_path / "README.md").read_text()
    assert "**This model is not trained**: the transformer took 41 steps" in text
    assert "- transformer: 41 steps in 6.0 min, loss 0.9\n" in text
    assert "- data: 8 images of 8 pixels in 1 classes" in text
    write_card(tmp_path, DATA, judge(DATA, DIT, VAE, 0.999, 0.998))
    assert "not trained" not in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("# My model\n")
    write_card(tmp_path, DATA, untrained)
    assert (tmp_path / "README.md").read_text() == "# My model\n"
    (tmp_path / "README.md").unlink()
    write_card(tmp_path, DATA, Outcome({}, ()))
