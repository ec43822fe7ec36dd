"""dit-train: arguments in, `train` out; errors of one line. Training itself is tested elsewhere."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from dit_engine.cli import train as command
from dit_engine.training import run as training
from dit_engine.training.card import Outcome
from dit_engine.training.run import TrainSettings


def test_every_setting_has_its_own_help() -> None:
    helps = {a.dest: a.help for a in command.build_parser()._actions}
    names = {field.name for field in fields(TrainSettings)}
    assert names == set(command._HELP)
    assert names <= set(helps)
    assert all(helps.values()) and len(set(helps.values())) == len(helps)


def test_arguments_reach_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def record(*args: object) -> tuple[Path, Outcome]:
        calls.append(args)
        return tmp_path / "model", Outcome({}, ())

    monkeypatch.setattr(training, "train", record)
    arguments = ["-o", str(tmp_path), "--device", "cpu", "--vae-steps", "7", "--dit-minutes", "0.5"]
    arguments += [
        "--decoder-steps",
        "2",
        "--vae-channels",
        "8",
        "16",
        "--flip",
        "ant",
        "bee",
        "--kl-weight",
        "0.5",
    ]
    assert command.main(arguments) == 0
    ((settings, vae_budget, dit_budget, directory, device, decoder_budget),) = calls
    assert settings == TrainSettings(vae_channels=(8, 16), flip=("ant", "bee"), kl_weight=0.5)
    assert (vae_budget.steps, vae_budget.minutes) == (7, None)
    assert (dit_budget.steps, dit_budget.minutes) == (None, 0.5)
    assert (decoder_budget.steps, decoder_budget.minutes) == (2, None)
    assert (directory, device) == (tmp_path, torch.device("cpu"))
    assert str(tmp_path / "model") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "foo"], "device 'foo' is not available; allowed: cpu"),
        (["--device", "meta"], "device 'meta' is not available; allowed: cpu"),
        (["--device", "cuda:99"], "device 'cuda:99' is not available; allowed: cpu"),
        (["--batch-size", "0"], "batch_size 0 is not a positive integer"),
        (["--dit-steps", "0"], "budget of 0"),
        (["--dit-minutes", "nan"], "budget of nan"),
        (["--size", "63"], "size 63"),
        (["--depth", "many"], "--depth: invalid int value: 'many' (see dit-train --help)"),
        (["--epochs", "3"], "--epochs 3 (see dit-train --help)"),
        (["--dit-steps", "3", "--dit-minutes", "3"], "not allowed with"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("training began"))
    try:
        code = command.main(["-o", str(tmp_path / "run"), *arguments])
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and error.endswith("\n")
    assert error.startswith("error: ") and message in error
    assert list(tmp_path.iterdir()) == []
