"""Replacing an output removes only files that this program wrote, whatever a manifest lists."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import write_bundle
from PIL import Image
from tiny import NAMES, tiny_dit, tiny_vae

from dit_engine.checkpoint import save_pretrained
from dit_engine.cli.generate import main as generate
from dit_engine.cli.train import main as train
from dit_engine.io.directories import Known, check_destination, new_directory, scratch_beside
from dit_export.bundle import MANIFEST, Bundle
from dit_export.bundle import replaceable as replaceable_export
from dit_export.cli import main as export
from dit_export.server.repository import MARKER, write_repository
from dit_export.server.repository import replaceable as replaceable_repository

THESIS = b"years of work"
MODEL, VAE = tiny_dit(), tiny_vae()


def native(path: Path) -> Path:
    save_pretrained(path, MODEL, VAE, NAMES)
    return path


def exported(path: Path) -> Path:
    return write_bundle(path).path


def repository(path: Path) -> Path:
    return write_repository(Bundle.open(exported(path.with_name("onnx"))), path)


def save_again(path: Path) -> None:
    save_pretrained(path, MODEL)


def write_again(replaceable: Callable[[bool], Known]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with new_directory(path, replaceable(True)) as partial:
            (partial / "new").touch()

    return write


# Kind → how it is written, how it is replaced, and the file that lists what belongs to it.
KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], None], str | None]] = {
    "model": (native, save_again, None),
    "export": (exported, write_again(replaceable_export), MANIFEST),
    "repository": (repository, write_again(replaceable_repository), MARKER),
}
FOREIGN = {
    "model": ["docs/thesis.tex", "vae/model.safetensors", "labels.json/thesis.tex"],
    "export": ["thesis.tex", "denoiser.onnx.data", "other.onnx"],
    "repository": ["dit/1/thesis.py", "dit/1/__pycache__/thesis.cpython-311.pyc",
                   "dit_transformer/1/transformer.onnx.data"],
}  # fmt: skip


def contents(directory: Path) -> dict[str, Any]:
    return {
        p.relative_to(directory).as_posix(): p.readlink() if p.is_symlink() else p.read_bytes()
        for p in directory.rglob("*")
        if p.is_symlink() or not p.is_dir()
    }


def unchanged(path: Path, again: Callable[[Path], None], message: str) -> None:
    """Replacing is refused in one line, and nothing is written or removed."""
    before = contents(path.parent)
    with pytest.raises(ValueError, match=f"{message}.*nothing was written") as caught:
        again(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert contents(path.parent) == before and not list(path.parent.glob(".*"))


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in FOREIGN.items() for name in names]
)
def test_files_of_others_are_never_removed(tmp_path: Path, kind: str, name: str) -> None:
    make, again, marker = KINDS[kind]
    path = make(tmp_path / "out")
    if (parent := (path / name).parent).is_file():
        parent.unlink()
    parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(THESIS)
    unchanged(path, again, name)
    if marker is not None:  # a stranger may list it, as if it had been written with the rest
        values = json.loads((path / marker).read_text())
        # A known name with its own hash is what was written, as far as anybody can tell.
        data = b"another" if name.endswith(".data") else THESIS
        digest = hashlib.sha256(data).hexdigest()
        listed = {"bytes": len(data), "sha256": digest} if marker == MANIFEST else digest
        values["files"][name] = listed
        (path / marker).write_text(json.dumps(values))
        unchanged(path, again, name)


@pytest.mark.parametrize("kind", KINDS)
def test_changed_files_are_not_removed(tmp_path: Path, kind: str) -> None:
    """Of a model, whose hashes nobody has, a file must have the right format."""
    make, again, marker = KINDS[kind]
    path = make(tmp_path / "out")
    for file in [p for p in path.rglob("*.*") if p.is_file() and p.name != marker]:
        before = file.read_bytes()
        file.write_bytes(THESIS)
        unchanged(path, again, "" if file.name == "config.json" else file.name)
        file.write_bytes(before)
    if marker is not None:
        values = json.loads((path / marker).read_text())
        (path / marker).write_text(json.dumps(values | {"format": 0, "files": []}))
        unchanged(path, again, "of another version: remove it, or choose another -o")


@pytest.mark.parametrize("linked", ["vae/config.json", "vae"])
def test_links_are_refused_and_not_followed(tmp_path: Path, linked: str) -> None:
    path = native(tmp_path / "out")
    (path / linked).rename(tmp_path / "elsewhere")
    (path / linked).symlink_to(tmp_path / "elsewhere")
    unchanged(path, save_again, "")


def test_the_current_directory_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process in it would go on in a directory that is gone."""
    monkeypatch.chdir(native(tmp_path / "out"))
    (tmp_path / "link").symlink_to("out")
    for target in (".", "..", tmp_path / "link"):
        with pytest.raises(ValueError, match="is the current directory or one above it"):
            save_again(Path(target))


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_link_of_ours_as_the_destination_is_followed(tmp_path: Path) -> None:
    disk, path = tmp_path / "scratch" / "disk", tmp_path / "out"
    disk.mkdir(parents=True)
    path.symlink_to("way")
    (tmp_path / "way").symlink_to(disk)
    native(path)
    assert path.is_symlink() and len(contents(disk)) > 2
    save_again(path)
    assert path.is_symlink() and len(contents(disk)) < 3 and not list(disk.parent.glob(".*"))
    (tmp_path / "file").touch()
    for target in ("nowhere", "out", "file"):
        path.unlink()
        path.symlink_to(target)
        with pytest.raises(ValueError, match="out: is a link to no directory; nothing"):
            save_again(path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="other owners need root")
@pytest.mark.parametrize("name", ["out", "way"])
def test_another_users_link_as_the_destination_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "way")
    (tmp_path / "way").symlink_to("disk")
    os.chown(tmp_path / name, 65534, 65534, follow_symlinks=False)
    said = "out: is a link that user 65534 made"
    for begin in (new_directory, scratch_beside):
        with pytest.raises(ValueError, match=said), begin(tmp_path / "out"):
            pytest.fail("the link was followed")


def test_what_changes_during_a_replacement_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename = repository(tmp_path / "out"), Path.rename
    changed, compiled = path / "dit" / "1" / "model.py", path / "dit" / "1" / "__pycache__"
    compiled.mkdir()
    (compiled / "model.cpython-311.pyc").touch()  # which goes with its source

    def late(self: Path, target: Path) -> Path:
        if self == path:
            (path / "thesis.tex").write_bytes(THESIS)
            changed.write_bytes(THESIS)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.warns(UserWarning, match=r"\.old is left: it holds what was not made here"):
        KINDS["repository"][1](path)
    (old,) = tmp_path.glob(".*.old")
    assert contents(old) == {"dit/1/model.py": THESIS, "thesis.tex": THESIS}
    assert contents(path).keys() == {"new"}


def test_a_directory_that_cannot_be_read_is_not_taken_for_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, scandir = native(tmp_path / "out"), os.scandir

    def refused(where: Any) -> Any:
        if Path(where).name == "vae":
            raise PermissionError(13, "Permission denied", str(where))
        return scandir(where)

    monkeypatch.setattr("os.scandir", refused)
    with pytest.raises(PermissionError):
        check_destination(path, lambda _: {"vae/config.json": None})


BAD = [
    (generate, "--labels 1", ["--labels nobody", "--steps 0", "--seeds 1 2", "--model nowhere"]),
    (export, "onnx", ["--model nowhere", "--dtype x", "--opset 1", "--graphs x"]),
    (export, "triton", ["--onnx nowhere", "--max-batch-size 0", "--guidance-channels 99"]),
    (train, "--data ../images --size 8 --dit-steps 1",
     ["--data nowhere", "--flip x", "--learning-rate -1", "--ema-decay 2", "--size 15"]),
    (train, "", ["--flip nobody"]),  # before avatars are rendered
]  # fmt: skip


def test_bad_inputs_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is made before the inputs are known to be right."""
    empty = tmp_path / "empty"
    native(tmp_path / "m")
    empty.mkdir()
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "0.png")
    monkeypatch.chdir(empty)
    for main, common, options in BAD:
        model = "" if main is train else "--model ../m"
        for bad in options:
            model = "" if "--onnx" in bad else model
            arguments = f"{common} {model} {bad} -o deep/out".split()
            assert main(arguments) == 2, arguments
            assert not list(empty.iterdir()), arguments
            assert capsys.readouterr().err.startswith("error: "), arguments
