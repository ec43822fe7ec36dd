"""A directory of images: written batch by batch, and not made twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dit_engine import Engine
from dit_engine.cli.generate import main

LABELS = ("cat", "7", "ant", "cat", "hen")


def run(model: Path, out: Path, *arguments: str, labels: tuple[str, ...] = LABELS) -> int:
    options = ("--steps", "3", "--device", "cpu", "--max-batch-size", "2")
    return main(["--model", str(model), *options, "--labels", *labels, "-o", str(out), *arguments])


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


class Calls:
    """The labels of every batch that the engine was asked for; it fails in the one numbered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.labels: list[list[int]] = []
        self.fail_at = -1
        generate = Engine.generate

        def counted(engine: Engine, labels: list[int], **options: object) -> object:
            if len(self.labels) == self.fail_at:
                raise KeyboardInterrupt
            self.labels.append(labels)
            return generate(engine, labels, **options)

        monkeypatch.setattr(Engine, "generate", counted)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def test_an_interrupted_series_goes_on(
    model: Path, tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--seed", "3", "--guidance-scale", "1", "2", "3", "4", "5")
    assert run(model, tmp_path / "whole", *options, "--max-batch-size", "8") == 0
    expected = contents(tmp_path / "whole")
    assert len(expected) == 5 and calls.labels == [[2, 7, 0, 2, 7]]
    calls.labels.clear()
    calls.fail_at = 2
    assert run(model, tmp_path / "out", *options) == 130
    assert contents(tmp_path / "out") == dict(list(expected.items())[:4])  # two batches of two
    calls.fail_at = -1
    capsys.readouterr()
    assert run(model, tmp_path / "out", *options) == 0
    assert calls.labels == [[2, 7], [0, 2], [7]]
    assert contents(tmp_path / "out") == expected
    captured = capsys.readouterr()
    assert captured.out.startswith("1 image in ") and "; 4 of 5 were there\n" in captured.out
    assert "3/3" in captured.err  # one image of three steps is left
    assert run(model, tmp_path / "out", *options) == 0
    assert len(calls.labels) == 3
    assert capsys.readouterr().out == f"0 images → {tmp_path / 'out'}; 5 of 5 were there\n"


def test_files_that_are_there(
    model: Path, tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of other settings, or that break off, are told of and left alone."""
    assert run(model, tmp_path / "none", "--steps", "0") == 2
    assert not (tmp_path / "none").exists()
    out = tmp_path / "out"
    assert run(model, out, "--seed", "3") == 0
    before = contents(out)
    calls.labels.clear()
    capsys.readouterr()
    for options, difference in (
        (("--steps", "4"), "has steps 3 and not 4"),
        (("--guidance-interval", "0.1", "5"), "has guidance_interval None and not [0.1, 5.0]"),
    ):
        assert run(model, out, "--seed", "3", *options) == 2
        assert difference in capsys.readouterr().err
    path = sorted(out.iterdir())[2]
    path.write_bytes(path.read_bytes()[:200])
    assert run(model, out, "--seed", "3") == 2
    error = capsys.readouterr().err
    assert f"{path} is no image of this engine: give another directory, or --overwrite" in error
    assert error.count("\n") == 1 and not calls.labels
    assert run(model, out, "--seed", "3", "--overwrite") == 0
    assert contents(out) == before and len(calls.labels) == 3
    assert run(model, out, "--seed", "4") == 0
    assert "; the directory holds 5 other images\n" in capsys.readouterr().out


def test_noise_of_all_images_at_once_is_taken_as_a_whole(
    model: Path, tmp_path: Path, calls: Calls
) -> None:
    options = ("--noise", "official", "--seed", "3", "--max-batch-size", "5")
    out = tmp_path / "official"
    assert run(model, out, *options) == 0
    before = contents(out)
    sorted(out.iterdir())[1].unlink()
    assert run(model, out, *options) == 0
    assert contents(out) == before and [len(labels) for labels in calls.labels] == [5, 5]


def test_given_latents_are_recorded_by_their_hash_and_random_seeds_as_they_were_drawn(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = torch.Generator().manual_seed(9)
    given, other = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    latents, out, again = tmp_path / "z.safetensors", tmp_path / "out", tmp_path / "again"
    save_file({"latents": given}, latents)
    options = ("--latents", str(latents))  # ddpm draws the noise of the steps
    assert run(model, out, *options, labels=("1", "2")) == 0
    with Image.open(min(out.iterdir())) as image:
        seed = str(json.loads(image.text["dit_engine"])["seed"])
    assert run(model, again, *options, "--seed", seed, labels=("1", "2")) == 0
    assert contents(again) == contents(out)
    save_file({"latents": other}, latents)
    assert run(model, out, *options, "--seed", seed, labels=("1", "2")) == 2
    assert "has latents_sha256 " in capsys.readouterr().err


def test_all_labels_in_turn(model: Path, tmp_path: Path, calls: Calls) -> None:
    options = ["--model", str(model), "--steps", "1", "--device", "cpu", "-o", str(tmp_path)]
    assert main([*options, "--all-labels", "--repeat", "2", "--seed", "0"]) == 0
    assert calls.labels == [[*range(10), *range(10)]]
    assert len(contents(tmp_path)) == 20
