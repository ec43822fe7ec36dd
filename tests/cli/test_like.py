"""dit-generate --like: an image tells how to make it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from tiny import tiny_dit, tiny_vae

from dit_engine.cli.generate import main


@pytest.mark.parametrize("noise", ["per-image", "official"])
def test_images_and_sheets_are_made_again(
    model: Path, tmp_path: Path, noise: str, record_of: Callable[[Path], dict]
) -> None:
    same = ["--model", str(model), "--quiet"]
    options = [*same, "--labels", "cat", "7", "--seed", "5", "--steps", "3", "--guidance-scale",
               "2", "1.5", "--sampler", "ddim", "--eta", "0.5", "--noise", noise]  # fmt: skip

    def again(source: Path, name: str, *more: str) -> bytes:
        assert main([*same, "--like", str(source), "-o", str(tmp_path / name), *more]) == 0
        return (tmp_path / name).read_bytes()

    assert main([*options, "-o", str(tmp_path / "out")]) == 0
    assert main([*options, "-o", str(tmp_path / "sheet.png")]) == 0
    sheet, (first, last) = tmp_path / "sheet.png", sorted((tmp_path / "out").iterdir())
    assert again(sheet, "again.png") == sheet.read_bytes()
    assert again(first, "one.png") == first.read_bytes()
    again(last, "last.png")
    with Image.open(last) as image, Image.open(tmp_path / "last.png") as same_again:
        assert image.tobytes() == same_again.tobytes()
    again(first, "six.png", "--seed", "6")
    assert record_of(tmp_path / "six.png")["steps"] == 3
    with Image.open(tmp_path / "six.png") as six, Image.open(tmp_path / "one.png") as one:
        assert six.tobytes() != one.tobytes()


@pytest.fixture(scope="module")
def bare_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for weight files of a model and a VAE that tell nothing but their shapes."""
    path = tmp_path_factory.mktemp("files")
    torch.save(tiny_dit(hidden_size=64, num_heads=1).state_dict(), path / "m.pt")
    save_file(tiny_vae().state_dict(), path / "v.safetensors")
    return ["--model", str(path / "m.pt"), "--vae", str(path / "v.safetensors"), "--quiet"]


def test_what_the_model_was_loaded_with_is_kept(bare_files: list[str], tmp_path: Path) -> None:
    options = [*bare_files, "--labels", "3", "4", "--seed", "5", "--steps", "2"]
    made, again = tmp_path / "a.png", tmp_path / "c.png"
    for option in ("--num-heads 2", "--prediction v_prediction", "--numerics diffusers",
                   "--vae-groups 16", "--vae-scaling-factor 0.9", "--columns 1"):  # fmt: skip
        assert main([*options, *option.split(), "-o", str(made)]) == 0
        assert main([*bare_files, "--like", str(made), "-o", str(again)]) == 0
        assert again.read_bytes() == made.read_bytes(), option
    latents = str(tmp_path / "z.safetensors")  # which have no columns
    assert main([*bare_files, "--like", str(made), "-o", latents]) == 0


def picture(path: Path, text: str | None) -> str:
    info = PngInfo()
    if text is not None:
        info.add_text("dit_engine", text)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return str(path)


def record(**changes: object) -> str:
    return json.dumps({"model": "builtin", "noise": "per-image"} | changes)


def test_what_tells_nothing_is_refused(
    bare_files: list[str], tmp_path: Path, told: Callable[[], str]
) -> None:
    out = ["-o", str(tmp_path / "b.png")]
    for text, message in (
        (None, "holds no settings"),
        ("[1]", "holds no settings"),
        (record(cfg=1), "with 'cfg', which is unknown"),
        (record(latents_sha256=""), "from given latents"),
        (record(num_heads=[3]), "num_heads is no number"),
        (record(labels=3), "labels is not a list"),
        (record(guidance_interval=3), "guidance_interval is no"),
    ):
        assert main(["--like", picture(tmp_path / "a.png", text), *out]) == 2
        assert message in told()
    # A model that was replaced, or whose scheduler was.
    text = record(model=bare_files[1], vae=bare_files[3], label=3, seed=5, steps=2,
                  guidance_scale=4.0, diffusion={"clip": 1.0})  # fmt: skip
    assert main([*bare_files, "--like", picture(tmp_path / "a.png", text), *out]) == 2
    assert "was made with diffusion {'clip': 1.0}, and" in told()
    assert main(["--like", str(tmp_path / "none.png"), *out]) == 2
    assert "none.png is not a readable image (No such file or directory)" in told()


def test_other_labels_and_samplers(
    model: Path, tmp_path: Path, record_of: Callable[[Path], dict], told: Callable[[], str]
) -> None:
    made, again = tmp_path / "a.png", tmp_path / "b.png"
    options = ["--model", str(model), "--labels", "1", "2", "--steps", "2", "--sampler", "ddim",
               "--spacing", "leading", "--quiet", "-o", str(made)]  # fmt: skip
    like = ["--model", str(model), "--like", str(made), "-o", str(again), "--quiet"]
    assert main([*options, "--seed", "5"]) == 0
    for more, expected in (
        (["--labels", "3"], {"seed": 5, "labels": None}),
        (["--repeat", "2"], {"seeds": [5, 6, 7, 8]}),
        (["--sampler", "dpm++"], {"steps": 20, "spacing": "linspace"}),
        (["--seeds", "8", "9"], {"seeds": [8, 9], "steps": 2, "spacing": "leading"}),
    ):
        assert main([*like, *more]) == 0
        found = record_of(again)
        assert {name: found.get(name) for name in expected} == expected
    assert main([*options, "--seeds", "5", "3"]) == 0
    assert main([*like, "--labels", "3"]) == 2
    line = told()
    assert "a.png records 2 seeds" in line and "--seed" in line
