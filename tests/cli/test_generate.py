"""dit-generate: the same images as Engine.generate, in files that tell how they were made."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import NAMES, tiny_dit, tiny_vae

from dit_engine import Engine, __version__
from dit_engine.checkpoint import save_pretrained
from dit_engine.cli.generate import build_parser, main

SETTINGS = ("steps", "sampler", "spacing", "eta", "guidance_scale", "precision",
            "guidance_channels", "guidance_interval", "noise")  # fmt: skip


def run(model: Path, *arguments: str) -> int:
    return main(["--model", str(model), "--steps", "3", "--device", "cpu", *arguments])


def record_of(path: Path) -> dict:
    with Image.open(path) as image:
        return json.loads(image.text["dit_engine"])


def test_files_hold_the_engines_images_and_how_to_make_them(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    options = ("--sampler", "ddim", "--eta", "0.5", "--guidance-scale", "2.5", "1.5")
    options += ("--spacing", "trailing", "--guidance-interval", "0.1", "5", "--seed", "40")
    assert run(model, "--labels", "cat", "7", "-o", str(out), *options) == 0
    engine = Engine.from_pretrained(model, device="cpu")
    expected = engine.generate(
        ["cat", 7], steps=3, sampler="ddim", eta=0.5, guidance_scale=[2.5, 1.5], seed=40,
        spacing="trailing", guidance_interval=(0.1, 5), output="np",
    ).images  # fmt: skip
    files = sorted(out.iterdir())
    assert [f.name for f in files] == ["00000-cat-seed40.png", "00001-hen-seed41.png"]
    for i, file in enumerate(files):
        with Image.open(file) as image:
            assert np.array_equal(np.asarray(image), expected[i])
        record = record_of(file)
        assert record["label"] == [2, 7][i] and record["seed"] == 40 + i and record["index"] == i
        assert record["label_name"] == ["cat", "hen"][i]
        assert record["version"] == __version__ and record["model"] == "tiny"
        assert record["guidance_scale"] == [2.5, 1.5][i]
        settings = {name: record[name] for name in SETTINGS}
        again = engine.generate(record["label"], seed=record["seed"], output="np", **settings)
        assert np.array_equal(again.images[0], expected[i])


def test_an_image_of_an_official_batch_tells_how_to_make_the_batch(
    model: Path, tmp_path: Path
) -> None:
    """Its noise depends on the batch, and whether that is doubled, on every scale."""
    options = ("--noise", "official", "--guidance-scale", "1", "3", "2", "--seed", "5")
    assert run(model, "--labels", "1", "2", "3", "-o", str(tmp_path), *options) == 0
    engine = Engine.from_pretrained(model, device="cpu")
    for i, file in enumerate(sorted(tmp_path.iterdir())):
        record = record_of(file)
        assert (record["label"], record["index"]) == (i + 1, i)
        settings = {name: record[name] for name in SETTINGS}
        again = engine.generate(record["labels"], seed=record["seed"], output="np", **settings)
        with Image.open(file) as image:
            assert np.array_equal(np.asarray(image), again.images[record["index"]])


def test_a_sheet_is_one_captioned_picture(model: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    labels = ["ant", "bee", "cat"]
    assert run(model, "--labels", *labels, "-o", str(sheet), "--columns", "3", "--seed", "1") == 0
    expected = Engine.from_pretrained(model, device="cpu").generate(labels, steps=3, seed=1)
    with Image.open(sheet) as image:
        assert image.width > 3 * 128 and 128 < image.height < 2 * 128
        record = json.loads(image.text["dit_engine"])
        assert image.text["sampler"] == "ddpm" and json.loads(image.text["seeds"]) == [1, 2, 3]
        for i in range(3):  # 16 pixels, shown 8 times as large, 4 apart
            shown = np.asarray(image)[4:132:8, 4 + 132 * i : 132 + 132 * i : 8]
            assert np.array_equal(shown, np.asarray(expected.images[i]))
    assert record["labels"] == [0, 1, 2] and record["label_names"] == labels
    again = Engine.from_pretrained(model, device="cpu").generate(
        record["label_names"], seeds=record["seeds"], **{name: record[name] for name in SETTINGS}
    )
    assert again.images == expected.images
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize("which", ["model", "bare_model"])
def test_safetensors_are_latents_with_or_without_a_vae(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(which)
    path = tmp_path / "z.safetensors"
    assert run(model, "--labels", "1", "4", "-o", str(path), "--seed", "2") == 0
    engine = Engine.from_pretrained(model, device="cpu")
    expected = engine.generate([1, 4], seed=2, steps=3, output="latent")
    assert torch.equal(load_file(path)["latents"], expected.images)
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["dit_engine"])
    assert record["labels"] == [1, 4] and record["seeds"] == [2, 3] and record["steps"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["z.safetensors"]


def test_npy_holds_all_images(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "images.npy"
    assert run(model, "--labels", "1", "4", "-o", str(path), "--seed", "2") == 0
    engine = Engine.from_pretrained(model, device="cpu")
    expected = engine.generate([1, 4], seed=2, steps=3, output="np").images
    images = np.load(path)
    assert images.dtype == np.uint8 and images.shape == (2, 16, 16, 3)
    assert np.array_equal(images, expected)
    assert [p.name for p in tmp_path.iterdir()] == ["images.npy"]


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_given_noise(model: Path, tmp_path: Path, suffix: str) -> None:
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    start = tmp_path / f"z{suffix}"
    if suffix == ".npy":
        np.save(start, z.double().numpy())
    else:
        save_file({"latents": z}, start)
    out = tmp_path / "v1.5"
    arguments = ("--labels", "3", "--sampler", "dpm++", "--latents", str(start))
    assert run(model, *arguments, "-o", str(out)) == 0
    engine = Engine.from_pretrained(model, device="cpu")
    expected = engine.generate(3, steps=3, sampler="dpm++", latents=z, output="np").images[0]
    (file,) = out.iterdir()
    assert file.name == "00000-dog.png"  # dpm++ draws nothing, so no seed was used
    with Image.open(file) as image:
        assert np.array_equal(np.asarray(image), expected)
    assert record_of(file)["seed"] is None


def test_odd_class_names_make_plain_file_names(tmp_path: Path) -> None:
    names = ("tench, Tinca tinca", "../a/b", "ré sumé", "x" * 400, "…", *NAMES[5:])
    save_pretrained(tmp_path / "model", tiny_dit(), tiny_vae(), names)
    out = tmp_path / "out"
    numbers = ("0", "1", "2", "3", "4")
    assert run(tmp_path / "model", "--labels", *numbers, "-o", str(out), "--seed", "0") == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "00000-tench-seed0.png",
        "00001-a-b-seed1.png",
        "00002-ré-sumé-seed2.png",
        f"00003-{'x' * 48}-seed3.png",
        "00004-4-seed4.png",
    ]


def test_tensor_files_are_as_readable_as_others(model: Path) -> None:
    modes = {p.stat().st_mode & 0o777 for p in model.rglob("*") if p.is_file()}
    assert len(modes) == 1, [oct(mode) for mode in modes]


def test_list_labels(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "--list-labels") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [[str(i), n] for i, n in enumerate(NAMES)]


def test_every_option_of_generate_has_a_flag() -> None:
    options = set(inspect.signature(Engine.generate).parameters) - {"self", "callback"}
    options |= set(inspect.signature(Engine.from_pretrained).parameters) - {"source"}
    flags = vars(build_parser().parse_args([]))
    assert options <= set(flags)


def test_the_bar_counts_image_steps(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--labels", "1", "2", "3", "--max-batch-size", "2", "-o", str(tmp_path))
    assert run(model, *arguments) == 0
    captured = capsys.readouterr()
    last = captured.err.split("\r")[-1]
    assert "9/9" in last and "image-step" in last  # 3 images, 3 steps
    assert captured.out.startswith("3 images in ")
    assert run(model, *arguments, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_list_labels_tells_of_names_that_classes_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("crane, bird", "maillot", "crane, machine", "maillot", *NAMES[4:])
    save_pretrained(tmp_path / "model", tiny_dit(), tiny_vae(), names)
    assert run(tmp_path / "model", "--list-labels") == 0
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 10
    assert "so give numbers: crane (0, 2); maillot (1, 3)" in told.err
