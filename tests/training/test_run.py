"""dit-train end to end on a small folder of images: both stages, resumption, bad input."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dit_engine import Engine
from dit_engine.cli.train import main
from dit_engine.training import run
from dit_engine.training.data import ImageSet, load_image_folder
from dit_engine.training.stopping import Stopped
from dit_engine.training.vae_stage import normalise_latents
from dit_engine.vae import AutoencoderKL, VAEConfig

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


def test_both_stages_give_a_model_that_the_engine_loads(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--data", str(folder), "-o", str(out), "--flip", "dark", *SMALL]
    assert main(arguments) == 0
    engine = Engine.from_pretrained(out / "model", device="cpu", check_finite=True)
    assert engine.label_names == ("dark", "light") and engine.image_size == 16
    assert engine.generate(["light"], steps=2, seed=0).images[0].size == (16, 16)
    for stage, step in (("vae", 3), ("dit", 3)):
        assert (out / stage / f"sheet-{step:06d}.png").is_file()
        assert torch.load(out / stage / "last.pt", weights_only=True)["step"] == step
    # Finished stages are not trained again: the same weights come out.
    weights = (out / "model" / "model.safetensors").read_bytes()
    assert main(arguments) == 0
    assert (out / "model" / "model.safetensors").read_bytes() == weights


def test_a_decoder_trained_on_leaves_the_encoder_and_the_transformer(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = ["--data", str(folder), "-o", str(out), "--flip", "dark", *SMALL]
    assert main(arguments) == 0
    before = load_model_files(out / "model")
    assert main([*arguments, "--decoder-steps", "2"]) == 0
    after = load_model_files(out / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    assert torch.load(out / "decoder" / "last.pt", weights_only=True)["step"] == 2


def load_model_files(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors") | load_file(next(path.glob("vae/*.safetensors")))


def test_a_run_is_resumed_with_its_own_settings_only(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(folder), "-o", str(tmp_path / "run"), *SMALL]
    assert main(arguments) == 0
    assert main([*arguments, "--depth", "2"]) == 2
    assert "holds a training with depth 1, not 2" in capsys.readouterr().err
    (folder / "aaa").mkdir()  # a class before the others would shift every label
    Image.new("RGB", (16, 16)).save(folder / "aaa" / "0.png")
    assert main(arguments) == 2
    assert "holds a training with class_names ['dark', 'light'], not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "class_names None is not a list of names"),
        ("{", "not valid JSON (Expecting property name"),
        ("[]", "holds a list, not a JSON object"),
        ('{"class_names": [1]}', "class_names [1] is not a list of names"),
    ],
)
def test_damaged_settings_of_a_run_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "run" / "settings.json"
    path.parent.mkdir()
    path.write_text(text)
    assert main(["--data", str(folder), "-o", str(path.parent), *SMALL]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: {message}") and error.count("\n") == 1


def test_a_model_of_three_steps_is_not_called_trained(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["--data", str(folder), "-o", str(out), *SMALL]) == 0
    told = capsys.readouterr()
    assert "loads the model, which is not trained" in told.out
    (note,) = [line for line in told.err.splitlines() if "note: " in line]
    assert "model is not trained: the transformer took 3 steps" in note
    assert "the autoencoder took 3 steps" in note
    card = (out / "model" / "README.md").read_text()
    assert "**This model is not trained**: the transformer took 3 steps" in card
    Engine.from_pretrained(out / "model", device="cpu")
    # Whatever somebody else wrote beside the model.
    (out / "model" / "README.md").write_text("# My model\n")
    assert main(["--data", str(folder), "-o", str(out), *SMALL]) == 0
    assert "loads the model, which is not trained" in capsys.readouterr().out


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Stopped("", signal.SIGTERM)])
def test_what_is_interrupted_between_checkpoints_says_how_to_go_on(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
) -> None:
    arguments = ["--data", str(folder), "-o", str(tmp_path / "run"), *SMALL]
    with monkeypatch.context() as patched:
        patched.setattr(run, "encode_all", raising(error))
        assert main(arguments) == (143 if isinstance(error, Stopped) else 130)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("stopped between two checkpoints; the same command again goes on")
    assert main(arguments) == 0


def test_what_is_interrupted_before_anything_is_kept_promises_nothing(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run, "load_image_folder", raising(KeyboardInterrupt()))
    out = tmp_path / "run"
    assert main(["--data", str(folder), "-o", str(out), *SMALL]) == 130
    assert capsys.readouterr().err == "stopped before anything was kept\n" and not out.exists()


def raising(error: BaseException) -> Callable[..., object]:
    def call(*_: object) -> object:
        raise error

    return call


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "threads 0 is not a positive integer"),
        (["--data", "nowhere"], "image folder nowhere is not a directory"),
        (["--size", "15"], "size 15 is not a multiple of"),
        (["--num-heads", "5"], "is not a multiple of num_heads 5"),
        (["--batch-size", "0"], "batch_size 0 is not a positive integer"),
        (["--vae-channels", "12"], "12 is not a positive multiple of norm_num_groups 8"),
        (["--dit-minutes", "nan"], "nan is not above 0"),
        (["--decoder-steps", "0"], "0 is not above 0"),
        (
            ["--data", "{folder}", "--size", "16", "--flip", "drk"],
            "flip: label 'drk' is unknown; did you mean 'dark'?",
        ),
    ],
)
def test_bad_settings_are_one_line(
    arguments: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(folder=folder) for argument in arguments]
    assert main(["-o", "run", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.startswith("error: ") and "\n" not in error
    assert not Path("run").exists()  # so that the corrected command is not refused


def test_an_unreadable_image_is_named(folder: Path) -> None:
    (folder / "dark" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(
        ValueError, match=r"broken\.png is not a readable image \(cannot identify image file\)"
    ):
        load_image_folder(folder, 16)
    (folder / "dark" / "broken.png").unlink()
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="class 'empty' holds no images"):
        load_image_folder(folder, 16)


def test_normalised_latents_have_unit_variance_and_decode_to_the_same_images() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(VAEConfig(block_out_channels=(8, 8), norm_num_groups=4)).double().eval()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    data = ImageSet(pixels, np.zeros(64, int), ("noise",))
    images = data.tensor(np.arange(64)).double()
    with torch.no_grad():
        mean, log_variance = vae.encode(images)
        rebuilt = vae.decode(mean)
        std = mean.std(dim=(0, 2, 3), keepdim=True)
        vae.float()
        normalise_latents(vae, data)
        vae.double()
        after, log_after = vae.encode(images)
        assert torch.allclose(after.mean(dim=(0, 2, 3)), torch.zeros(4).double(), atol=1e-4)
        assert torch.allclose(after.std(dim=(0, 2, 3)), torch.ones(4).double(), atol=1e-4)
        assert torch.allclose(log_after, log_variance - 2 * std.log(), atol=1e-4)
        assert torch.allclose(vae.decode(after), rebuilt, atol=1e-4)
