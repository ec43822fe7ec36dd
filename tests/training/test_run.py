"""dit-train end to end on a small folder of images: both stages, resumption, bad input."""

from __future__ import annotations

import math
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dit_engine import Engine
from dit_engine.cli.train import main
from dit_engine.training import run
from dit_engine.training.card import NOISE_GUESS_MSE, Outcome, judge, write_card
from dit_engine.training.data import ImageSet, load_image_folder
from dit_engine.training.loop import Budget, Stage
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
    # Three steps do not train a model, which each place says.
    assert "loads the model, which is not trained" in told.out
    assert "model is not trained: the transformer took 3 steps" in told.err
    card = (out / "model" / "README.md").read_text()
    assert "**This model is not trained**: the transformer took 3 steps" in card
    engine = Engine.from_pretrained(out / "model", device="cpu", check_finite=True)
    assert engine.label_names == ("dark", "light") and engine.image_size == 16
    assert engine.generate(["light"], steps=2, seed=0).images[0].size == (16, 16)
    for stage in ("vae", "dit"):
        assert (out / stage / "sheet-000003.png").is_file()
        assert torch.load(out / stage / "last.pt", weights_only=True)["step"] == 3
    # Finished stages are not trained again. A decoder that is trained on leaves the encoder and the
    # transformer as they are.
    before = weights_of(out / "model")
    assert main([*arguments, "--decoder-steps", "2"]) == 0
    after = weights_of(out / "model")
    assert before.keys() == after.keys()
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


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Stopped("", signal.SIGTERM)])
def test_what_is_interrupted_between_checkpoints_says_how_to_go_on(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
) -> None:
    def interrupted(*_: object) -> None:
        raise error

    out = tmp_path / "run"
    arguments = ["--data", str(folder), "-o", str(out), *SMALL]
    for function, told in (
        ("load_image_folder", "stopped before anything was kept"),
        ("encode_all", "stopped between two checkpoints; the same command again goes on"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(run, function, interrupted)
            assert main(arguments) == (143 if isinstance(error, Stopped) else 130)
        assert capsys.readouterr().err.splitlines()[-1].startswith(told)
        assert out.exists() == (function == "encode_all")


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
    arguments = ["--data", str(folder), "-o", str(out), *SMALL, "--dit-steps", str(step + 5)]
    assert main(arguments) == 0
    assert torch.load(out / "dit/last.pt", weights_only=True)["step"] == step + 5 >= 55


def test_bad_input_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)

    def refused(*arguments: str) -> str:
        try:
            code: object = main(["-o", "run", *arguments])
        except SystemExit as stopped:
            code = stopped.code
        error = capsys.readouterr().err
        assert code == 2 and error.count("\n") == 1 and error.startswith("error: "), error
        return error

    for arguments, message in (
        (["--device", "foo"], "device 'foo' is not available; allowed: cpu"),
        (["--threads", "0"], "threads 0 is not a positive integer"),
        (["--data", "nowhere"], "image folder nowhere is not a directory"),
        (["--size", "15"], "size 15 is not a multiple of"),
        (["--batch-size", "0"], "batch_size 0: allowed is 1 or more"),
        (["--learning-rate", "nan"], "learning_rate nan: allowed is 0 or more"),
        (["--dit-steps", "0"], "budget of 0"),
        (["--decoder-steps", "0"], "0 is not above 0"),
        (["--depth", "many"], "--depth: invalid int value: 'many' (see dit-train --help)"),
        (["--dit-steps", "3", "--dit-minutes", "3"], "not allowed with"),
        (["--data", str(folder), "--size", "16", "--flip", "drk"],
         "flip: label 'drk' is unknown; did you mean 'dark'?"),
    ):  # fmt: skip
        assert message in refused(*arguments)
        assert not Path("run").exists()  # so that the corrected command is not refused
    path = Path("run/settings.json")
    path.parent.mkdir()
    path.write_text('{"class_names": [1]}')
    told = refused("--data", str(folder), *SMALL)
    assert told.startswith(f"error: {path}: class_names [1] is not a list of names")
    (folder / "dark" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"broken\.png is not a readable image \(cannot identify"):
        load_image_folder(folder, 16)
    (folder / "dark" / "broken.png").unlink()
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="class 'empty' holds no images"):
        load_image_folder(folder, 16)


def test_options_reach_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def record(*args: object) -> tuple[Path, Outcome]:
        calls.append(args)
        return tmp_path / "model", Outcome({}, ())

    monkeypatch.setattr(run, "train", record)
    arguments = ["-o", str(tmp_path), "--device", "cpu", "--vae-steps", "7", "--dit-minutes", "0.5",
                 "--decoder-steps", "2", "--vae-channels", "8", "16", "--flip", "ant", "bee",
                 "--kl-weight", "0.5"]  # fmt: skip
    assert main(arguments) == 0
    settings = TrainSettings(vae_channels=(8, 16), flip=("ant", "bee"), kl_weight=0.5)
    budgets = Budget(steps=7), Budget(minutes=0.5)
    assert calls == [(settings, *budgets, tmp_path, "cpu", Budget(steps=2))]


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
    errors = [
        float(loss(lambda xt, t, f=f: f * loss.sqrt_one_minus_bar[t].view(-1, 1, 1, 1) * xt,
                   x0, t, noise)["mse"])
        for f in (1, 0.95, 1.05)
    ]  # fmt: skip
    assert errors[0] == pytest.approx(NOISE_GUESS_MSE, rel=3e-3)
    assert min(errors[1:]) > NOISE_GUESS_MSE  # and no other multiple of x_t is better


def test_what_is_plainly_not_trained_and_its_card(tmp_path: Path) -> None:
    few, unknown = Stage(120, 1.0, {"loss": 0.1, "mse": 0.1}), Stage(5000, 1.0, {})
    for transformer, autoencoder, decay, message in (
        (DIT, VAE, 0.999, ""),
        (None, None, 0.999, ""),
        (unknown, replace(unknown, step=3000), 0.999, ""),  # old checkpoints know no losses
        (few, VAE, 0.99, ""),  # few steps are many where the average is short
        (replace(DIT, step=41), VAE, 0.999, "the transformer took 41 steps, and its weights"),
        (replace(DIT, losses={"mse": 0.3}), VAE, 0.999, "error, 0.3, is not below the 0.276"),
        (replace(DIT, losses={"mse": math.nan}), VAE, 0.999, "error, nan, is not below"),
        (DIT, replace(VAE, losses={"pixel": 1.01}), 0.999, "error, 1.01, is not below the 1"),
    ):
        found = judge(DATA, transformer, autoencoder, decay, 0.998).shortcomings
        assert len(found) == bool(message) and message in "".join(found)
    plain = ImageSet(np.full((4, 8, 8, 3), 200, np.uint8), np.zeros(4, int), ("a",))
    stage = Stage(5000, 1.0, {"pixel": 0.004})  # of images of one colour
    assert judge(plain, DIT, stage, 0.999, 0.998).shortcomings == ()
    card = tmp_path / "README.md"
    untrained = judge(DATA, Stage(41, 360.0, {"loss": 0.9, "mse": 0.87}), VAE, 0.999, 0.998)
    write_card(tmp_path, DATA, untrained)
    assert "- transformer: 41 steps in 6.0 min, loss 0.9\n" in card.read_text()
    write_card(tmp_path, DATA, judge(DATA, DIT, VAE, 0.999, 0.998))
    assert "not trained" not in card.read_text()
    card.write_text("# My model\n")
    write_card(tmp_path, DATA, untrained)
    assert card.read_text() == "# My model\n"
