"""dit-generate --like: an image tells how to make it again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from tiny import tiny_dit, tiny_vae

from dit_engine.cli.generate import main


@pytest.mark.parametrize("noise", ["per-image", "official"])
def test_images_and_sheets_are_made_again(model: Path, tmp_path: Path, noise: str) -> None:
    options = ["--model", str(model), "--labels", "cat", "7", "--seed", "5", "--steps", "3",
               "--guidance-scale", "2", "1.5", "--sampler", "ddim", "--eta", "0.5",
               "--noise", noise]  # fmt: skip
    assert main([*options, "-o", str(tmp_path / "out")]) == 0
    assert main([*options, "-o", str(tmp_path / "sheet.png")]) == 0
    same = ["--model", str(model)]
    like = [*same, "--like", str(tmp_path / "sheet.png")]
    assert main([*like, "-o", str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "sheet.png").read_bytes()
    first = min((tmp_path / "out").iterdir())
    assert main([*same, "--like", str(first), "-o", str(tmp_path / "one.png")]) == 0
    assert (tmp_path / "one.png").read_bytes() == first.read_bytes()
    last = max((tmp_path / "out").iterdir())
    assert main([*same, "--like", str(last), "-o", str(tmp_path / "last.png")]) == 0
    with Image.open(last) as image, Image.open(tmp_path / "last.png") as again:
        assert image.tobytes() == again.tobytes()
    like = [*same, "--like", str(first), "--seed", "6"]
    assert main([*like, "-o", str(tmp_path / "six.png")]) == 0
    with Image.open(tmp_path / "six.png") as image:
        assert json.loads(image.info["dit_engine"])["steps"] == 3
        assert image.tobytes() != Image.open(tmp_path / "one.png").tobytes()


@pytest.fixture(scope="module")
def bare_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for weight files of a model and a VAE that tell nothing but their shapes."""
    path = tmp_path_factory.mktemp("files")
    torch.save(tiny_dit(hidden_size=64, num_heads=1).state_dict(), path / "m.pt")
    save_file(tiny_vae().state_dict(), path / "v.safetensors")
    return ["--model", str(path / "m.pt"), "--vae", str(path / "v.safetensors")]


@pytest.mark.parametrize(
    "option",
    [
        "--num-heads 2", "--prediction v_prediction", "--numerics diffusers", "--vae-groups 16",
        "--vae-scaling-factor 0.9", "--vae-shift-factor 3", "--columns 1",
    ],
)  # fmt: skip
def test_what_the_model_was_loaded_with_is_kept(
    bare_files: list[str], option: str, tmp_path: Path
) -> None:
    options = [*bare_files, "--labels", "3", "4", "--seed", "5", "--steps", "2", "--quiet"]
    made, plain, again = (str(tmp_path / name) for name in ("a.png", "b.png", "c.png"))
    assert main([*options, *option.split(), "-o", made]) == 0
    assert main([*options, "-o", plain]) == 0
    assert main([*bare_files, "--like", made, "-o", again, "--quiet"]) == 0
    assert Path(again).read_bytes() == Path(made).read_bytes()
    with Image.open(made) as one, Image.open(plain) as other:
        assert option.startswith("--numerics") or one.tobytes() != other.tobytes()
    latents = str(tmp_path / "z.safetensors")
    assert main([*bare_files, "--like", made, "-o", latents, "--quiet"]) == 0


def test_another_diffusion_is_refused(
    bare_files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where the file was replaced, or a scheduler beside it."""
    record = {"model": bare_files[1], "vae": bare_files[3], "noise": "per-image", "label": 3,
              "seed": 5, "steps": 2, "guidance_scale": 4.0, "diffusion": {"clip": 1.0}}  # fmt: skip
    info = PngInfo()
    info.add_text("dit_engine", json.dumps(record))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    options = ["--like", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png"), "--quiet"]
    assert main([*bare_files, *options]) == 2
    told = capsys.readouterr().err
    assert "was made with diffusion {'clip': 1.0}, and" in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no settings"),
        ("[" * 5000, "holds no settings"),
        ("[1]", "holds no settings"),
        ('{"model": "builtin", "noise": "per-image", "cfg": 1}', "with 'cfg', which is unknown"),
        ('{"model": "builtin", "noise": "per-image", "latents_sha256": ""}', "from given latents"),
        ('{"model": "builtin", "noise": "", "num_heads": [3]}', "num_heads is no number"),
        ('{"model": 3, "noise": "per-image"}', "model is no text"),
        ('{"model": "builtin", "noise": "per-image", "labels": 3}', "labels is not a list"),
        ('{"model": "builtin", "noise": "", "guidance_interval": 3}', "guidance_interval is no"),
    ],
)
def test_what_tells_nothing_is_refused(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = PngInfo()
    if text is not None:
        info.add_text("dit_engine", text)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    assert main(["--like", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png")]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_what_is_no_picture_is_named_as_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.png"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    assert main(["--like", str(path), "-o", str(tmp_path / "b.png")]) == 2
    assert f"error: {path}: a Git LFS pointer (to 5 bytes), not an image" in capsys.readouterr().err
    assert main(["--like", str(tmp_path / "none.png"), "-o", str(tmp_path / "b.png")]) == 2
    assert "none.png is not a readable image (No such file or directory)" in capsys.readouterr().err


def test_other_labels_and_samplers(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def record(name: str) -> dict:
        with Image.open(tmp_path / name) as image:
            return json.loads(image.info["dit_engine"])

    options = ["--model", str(model), "--labels", "1", "2", "--steps", "2", "--sampler", "ddim",
               "--spacing", "leading"]  # fmt: skip
    assert main([*options, "--seed", "5", "-o", str(tmp_path / "a.png")]) == 0
    like = ["--model", str(model), "--like", str(tmp_path / "a.png")]
    like += ["-o", str(tmp_path / "b.png")]
    assert main([*like, "--labels", "3"]) == 0
    assert record("b.png")["seed"] == 5
    assert main([*like, "--repeat", "2"]) == 0
    assert record("b.png")["seeds"] == [5, 6, 7, 8]
    assert main([*like, "--sampler", "dpm++"]) == 0
    assert [record("b.png")[key] for key in ("steps", "spacing")] == [20, "linspace"]
    assert main([*options, "--seeds", "5", "3", "-o", str(tmp_path / "a.png")]) == 0
    capsys.readouterr()
    assert main([*like, "--labels", "3"]) == 2
    assert "a.png records 2 seeds" in (told := capsys.readouterr().err) and "--seed" in told
