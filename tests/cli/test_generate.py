"""dit-generate: the same images as Engine.generate, in files that tell how they were made."""

from __future__ import annotations

import inspect
import io
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
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
from dit_engine.console import output

SETTINGS = ("steps", "sampler", "spacing", "eta", "guidance_scale", "precision",
            "guidance_channels", "guidance_interval", "noise")  # fmt: skip
Record = Callable[[Path], dict]
Told = Callable[[], str]


def run(model: Path, *arguments: str) -> object:
    """Exit code, argparse's too."""
    try:
        return main(["--model", str(model), "--steps", "3", "--device", "cpu", *arguments])
    except SystemExit as stopped:
        return stopped.code


def test_files_hold_the_engines_images_and_how_to_make_them(
    model: Path, tmp_path: Path, record_of: Record
) -> None:
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
    model: Path, tmp_path: Path, record_of: Record
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


def test_a_sheet_is_one_captioned_picture_also_on_standard_output(
    model: Path, tmp_path: Path, record_of: Record, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    sheet, labels = tmp_path / "sheet.png", ["ant", "bee", "cat"]
    arguments = ("--labels", *labels, "--columns", "3", "--seed", "1")
    assert run(model, *arguments, "-o", str(sheet)) == 0
    expected = Engine.from_pretrained(model, device="cpu").generate(labels, steps=3, seed=1)
    with Image.open(sheet) as image:
        assert image.width > 3 * 128 and 128 < image.height < 2 * 128
        for i in range(3):  # 16 pixels, shown 8 times as large, 4 apart
            shown = np.asarray(image)[4:132:8, 4 + 132 * i : 132 + 132 * i : 8]
            assert np.array_equal(shown, np.asarray(expected.images[i]))
    record = record_of(sheet)
    assert record["labels"] == [0, 1, 2] and record["label_names"] == labels
    capfdbinary.readouterr()
    for more in ([], ["--quiet"]):
        assert run(model, *arguments, "-o", "-", *more) == 0
        out, err = capfdbinary.readouterr()
        assert out == sheet.read_bytes()
        assert err == b"" if more else "→ standard output" in err.decode()


def test_arrays_and_latents(bare_model: Path, model: Path, tmp_path: Path) -> None:
    for source, name, kind in ((model, "a.npy", "np"), (bare_model, "z.safetensors", "latent")):
        path = tmp_path / name
        assert run(source, "--labels", "1", "4", "-o", str(path), "--seed", "2") == 0
        engine = Engine.from_pretrained(source, device="cpu")
        expected = engine.generate([1, 4], seed=2, steps=3, output=kind).images
        found = np.load(path) if kind == "np" else load_file(path)["latents"].numpy()
        assert found.dtype == (np.uint8 if kind == "np" else np.float32)
        assert np.array_equal(found, np.asarray(expected))
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["dit_engine"])
    assert record["labels"] == [1, 4] and record["seeds"] == [2, 3] and record["steps"] == 3


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_given_noise(model: Path, tmp_path: Path, suffix: str, record_of: Record) -> None:
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    start = tmp_path / f"z{suffix}"
    if suffix == ".npy":
        np.save(start, z.double().numpy())
    else:
        save_file({"latents": z}, start)
    out = tmp_path / "v1.5"  # no suffix of a file: a directory
    arguments = ("--labels", "3", "--sampler", "dpm++", "--latents", str(start))
    assert run(model, *arguments, "-o", str(out)) == 0
    engine = Engine.from_pretrained(model, device="cpu")
    expected = engine.generate(3, steps=3, sampler="dpm++", latents=z, output="np").images[0]
    (file,) = out.iterdir()
    assert file.name == "00000-dog.png"  # dpm++ draws nothing, so no seed was used
    with Image.open(file) as image:
        assert np.array_equal(np.asarray(image), expected)
    assert record_of(file)["seed"] is None


def test_odd_class_names_make_plain_file_names_and_shared_ones_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("tench, Tinca tinca", "../a/b", "ré sumé", "x" * 400, "…", "tench, fish", *NAMES[6:])
    save_pretrained(tmp_path / "model", tiny_dit(), tiny_vae(), names)
    out = tmp_path / "out"
    assert run(tmp_path / "model", "--labels", *"01234", "-o", str(out), "--seed", "0") == 0
    assert [p.name for p in sorted(out.iterdir())] == [
        "00000-tench-seed0.png", "00001-a-b-seed1.png", "00002-ré-sumé-seed2.png",
        f"00003-{'x' * 48}-seed3.png", "00004-4-seed4.png",
    ]  # fmt: skip
    capsys.readouterr()
    assert run(tmp_path / "model", "--list-labels") == 0
    said = capsys.readouterr()
    assert said.out.split("\n")[1] == "   1  ../a/b" and "so give numbers: tench (0, 5)" in said.err


def test_every_option_of_generate_has_a_flag() -> None:
    options = set(inspect.signature(Engine.generate).parameters) - {"self", "callback"}
    options |= set(inspect.signature(Engine.from_pretrained).parameters) - {"source"}
    assert options <= set(vars(build_parser().parse_args([])))


def test_the_bar_counts_image_steps(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--max-batch-size", "2", "-o", str(tmp_path), "--labels", "1", "2", "3")
    assert run(model, *arguments) == 0
    captured = capsys.readouterr()
    last = captured.err.split("\r")[-1]
    assert "9/9" in last and "image-step" in last  # 3 images, 3 steps
    assert captured.out.startswith("3 images in ")
    assert run(model, *arguments, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


# What is given beside --labels 1 → what the one line names.
BAD = [
    (["--labels", "unicorn"], "label 'unicorn' is unknown"),
    (["--all-labels"], "give --labels, class names or numbers (see --list-labels), or --all-"),
    (["--repeat", "0"], "repeat 0 is not a positive integer"),
    (["--steps", "1001"], "steps 1001"),
    (["--steps", "ten"], "--steps: invalid int value: 'ten' (see dit-generate --help)"),
    (["--num-inference-steps", "10"], "(see dit-generate --help); did you mean --steps?"),
    (["--backend", "onnx"], "backend 'onnx' is unknown; did you mean 'onnxruntime'? choose one of"),
    (["--guidance-channels", "foo"], "'foo' is neither a number of latent channels (1, 2, …)"),
    (["--device", "cuda:99"], "device 'cuda:99' is not available; allowed: cpu"),
    (["--latents", "nowhere.npy"], "nowhere.npy"),
    (["--latents", "z.pt"], "z.pt: use a .npy or a .safetensors file"),
    (["--model", "nowhere.pt"], "nowhere.pt"),
    (["--columns", "3", "-o", "images"], "--columns is of a sheet, a .png, and images is none"),
    (["-o", "missing/sheet.png"], "missing/sheet.png: the directory missing does not exist"),
    (["-o", "sheet.jpg"], "sheet.jpg: .jpg files are not written; use .png, .npy, .safetensors"),
    (["-o", "/proc/sheet.png"], "/proc/sheet.png cannot be written: "),
    (["-o", "/proc/new/images"], "/proc/new/images cannot be written: "),
    (["-o", "x" * 250 + ".png"], "cannot be written: File name too long"),
    (["-o", "x" * 300], "File name too long"),
]


def test_bad_input_is_one_line_and_exit_code_2(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Told
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, message in BAD:
        assert run(model, "--labels", "1", *arguments) == 2, arguments
        line = told()
        assert line.startswith("error: ") and message in line, line
        assert list(tmp_path.iterdir()) == [], arguments
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for closed, message in ((set(), "which is a terminal here"), ({1}, "output is closed")):
        monkeypatch.setattr(output, "closed", closed)
        assert run(Path("nowhere"), "--labels", "1", "-o", "-") == 2
        assert message in told()


def test_a_model_without_vae_makes_no_images(bare_model: Path, tmp_path: Path, told: Told) -> None:
    for name in ("sheet.png", "images.npy", "images"):
        assert run(bare_model, "--labels", "1", "-o", str(tmp_path / name)) == 2
        assert "this model has no VAE" in told()
    assert list(tmp_path.iterdir()) == []


def test_an_output_in_the_way(model: Path, tmp_path: Path, told: Told) -> None:
    (tmp_path / "file").write_text("here first")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    for name, message in (
        ("file", "file cannot be written: Not a directory"),
        ("file/deeper", "file/deeper cannot be written: Not a directory"),
        ("file/sheet.png", "file/sheet.png cannot be written: Not a directory"),
        ("folder.png", "is a directory; a file name is needed"),
        ("link", "link cannot be written: No such file or directory"),
    ):
        assert run(model, "--labels", "1", "-o", str(tmp_path / name)) == 2
        assert message in told()
    assert (tmp_path / "file").read_text() == "here first"
    assert sorted(tmp_path.iterdir()) == before and not any((tmp_path / "folder.png").iterdir())


def test_damaged_tensors_are_named(model: Path, tmp_path: Path, told: Told) -> None:
    z, given = torch.zeros(1, 4, 8, 8), tmp_path / "given"
    given.mkdir()
    save_file({"a": z, "b": z + 1}, given / "two.safetensors")
    save_file({"z": z.bool()}, given / "bool.safetensors")
    whole = (given / "two.safetensors").read_bytes()
    (given / "cut.safetensors").write_bytes(whole[:-100])
    (given / "empty.npy").touch()
    np.save(given / "words.npy", np.array(["cat", "dog"]))
    np.save(given / "objects.npy", np.array([{}, []], object), allow_pickle=True)
    np.save(given / "whole.npy", z.numpy())
    (given / "cut.npy").write_bytes((given / "whole.npy").read_bytes()[:-8])
    (given / "whole.npy").unlink()
    (given / "folder.npy").mkdir()
    for path in given.iterdir():
        for option in ("--latents", "--step-noise"):
            arguments = (option, str(path), "-o", str(tmp_path / "out.png"))
            assert run(model, "--labels", "1", *arguments) == 2, path.name
            assert str(path) in told()
    assert list(tmp_path.iterdir()) == [given]


def test_notes_come_before_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a file that is replaced, of other images in a directory, and of warnings."""
    said, generate, load = [], Engine.generate, Engine.from_pretrained

    def listened(*values: object, **options: object) -> object:
        said.append(capsys.readouterr().err)
        return generate(*values, **options)

    def loud_load(*args: object, **options: object) -> Engine:
        warnings.warn("guessed\nthe heads", stacklevel=1)
        return load(*args, **options)

    def notes(*arguments: str) -> list[str]:
        said.clear()
        assert run(model, "--labels", "1", "2", *arguments) == 0
        capsys.readouterr()
        return [line for line in said[0].splitlines() if line.startswith("note: ")]

    monkeypatch.setattr(Engine, "generate", listened)
    monkeypatch.setattr(Engine, "from_pretrained", loud_load)
    monkeypatch.chdir(tmp_path)
    loud, hint = "note: guessed the heads", "; give the --seed of an earlier call to continue that"
    replaced = "note: sheet.png exists and will be replaced"  # the usual name
    assert notes() == [loud] and sorted(notes()) == sorted([loud, replaced])
    assert notes("--overwrite") == [loud] and notes("--quiet") == []
    # A directory of this name, and no standard output.
    assert notes("-o", "./-", "--quiet") == []
    assert f"note: {tmp_path}/- holds other PNGs (2), which stay{hint}" in notes("-o", "./-")[1]
    assert notes("-o", "./-", "--seed", "1")[1].endswith("(4), which stay")


@pytest.mark.slow
def test_the_installed_command_in_a_pipe(model: Path, tmp_path: Path) -> None:
    """The picture is whole, whatever the terminal's encoding."""
    command = [sys.executable, "-m", "dit_engine.cli.generate", "--model", str(model), "--steps",
               "2", "--quiet", "-o", "-", "--labels", "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, cwd=tmp_path,
                          env={"PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    Image.open(io.BytesIO(done.stdout)).load()
