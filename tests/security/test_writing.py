"""Nothing is written or removed through links of another user in the directory of an output."""

from __future__ import annotations

import os
import secrets
import stat
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from PIL import Image

from dit_engine.io.directories import new_directory, scratch_beside
from dit_engine.io.files import atomic_path, locked, save_tensors
from dit_engine.training.log import add_row

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links of other users")
linux = pytest.mark.skipif(sys.platform != "linux", reason="names of open directories")
Begin = Callable[[Path], AbstractContextManager[Path]]
BEGINS: tuple[Begin, ...] = (atomic_path, new_directory, scratch_beside)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


def only(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.ones(3))


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("new"),
    "npy": one_array,
    "png": lambda path: Image.new("RGB", (2, 2)).save(path, "PNG"),
    "pt": lambda path: torch.save({"a": 1}, path),
    "safetensors": lambda path: save_tensors({"a": torch.ones(2)}, path),
}


def test_guessable_names_are_not_used(tmp_path: Path, victim: Path) -> None:
    for kind, write in WRITERS.items():
        folder = tmp_path / kind
        folder.mkdir()
        laid = folder / f".x.bin.{os.getpid()}.partial"
        laid.symlink_to(victim)
        with atomic_path(folder / "x.bin") as partial:
            inside = stat.S_IMODE(partial.parent.stat().st_mode)
            write(partial)
        assert inside == 0o700  # nobody else's links can come to lie there
        assert victim.read_text() == "precious" and laid.is_symlink()
        assert only(folder) == [laid.name, "x.bin"]


@pytest.mark.parametrize("thing", ["link to a directory", "link to a file", "directory"])
def test_even_a_guessed_name_is_not_followed(
    tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch, thing: str
) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda _: "guessed")
    laid, trap = tmp_path / ".x.bin.guessed.partial", tmp_path / "trap"
    trap.mkdir()
    (trap / ".x.bin.partial").symlink_to(victim)
    if thing == "directory":
        trap.rename(laid)
    else:
        laid.symlink_to(trap if "directory" in thing else victim)
    for begin in BEGINS:
        with pytest.raises(FileExistsError), begin(tmp_path / "x.bin"):
            pytest.fail("the name was taken")
    assert victim.read_text() == "precious" and os.path.lexists(laid)


def exchanged(folder: Path, victim: Path) -> None:
    """As anyone may without a sticky bit: our hidden directory goes, and links come."""
    (hidden,) = folder.glob(".*")
    hidden.rename(folder / "away")
    hidden.mkdir()
    for name in ("new.partial", ".x.bin.partial"):
        (hidden / name).symlink_to(victim)


@linux
def test_a_directory_that_is_exchanged_while_we_write(tmp_path: Path, victim: Path) -> None:
    with atomic_path(tmp_path / "x.bin") as partial:
        exchanged(tmp_path, victim)
        partial.write_text("new")
    assert victim.read_text() == "precious" and (tmp_path / "x.bin").read_text() == "new"


@linux
@pytest.mark.parametrize("begin", BEGINS[1:])
def test_a_directory_of_many_files_that_is_exchanged(tmp_path: Path, begin: Begin) -> None:
    (tmp_path / "etc").mkdir()
    with begin(tmp_path / "model") as new:
        exchanged(tmp_path, tmp_path / "etc")
        (new / "config.json").write_text("new")
        (new / "vae").mkdir()
        save_tensors({"a": torch.ones(2)}, new / "vae" / "a.safetensors")
        files = sorted(path.name for path in new.rglob("*"))
    assert files == ["a.safetensors", "config.json", "vae"] and not only(tmp_path / "etc")
    assert begin is scratch_beside or (tmp_path / "model" / "config.json").read_text() == "new"


def test_what_is_removed_is_not_sought_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, etc = tmp_path / "model" / "vae", tmp_path / "etc"
    for folder in (old, etc):
        folder.mkdir(parents=True)
    (old / "config.json").write_text("old")
    os.link(old / "config.json", etc / "config.json")  # the same file: no fact tells them apart
    rename = Path.rename

    def late(self: Path, target: Path) -> None:
        rename(self, target)
        if target.suffix == ".old":
            rename(target / "vae", tmp_path / "away")
            (target / "vae").symlink_to(etc)

    monkeypatch.setattr(Path, "rename", late)
    with (
        pytest.warns(UserWarning, match="holds what was not made here"),
        new_directory(tmp_path / "model", lambda _: {"vae/config.json": None}) as new,
    ):
        (new / "config.json").touch()
    assert only(etc) == ["config.json"] and only(tmp_path / "model") == ["config.json"]


def fail(error: Exception, path: Path) -> NoReturn:
    error.args = tuple(str(a).format(path) for a in error.args)
    if isinstance(error, OSError):
        error.filename = str(path)
    raise error


def test_errors_name_the_path_that_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for begin in BEGINS:
        name = ".x.bin." if begin is scratch_beside else "x.bin"
        for error in (ValueError("{}: is bad"), OSError(28, "No space", "{}"), RuntimeError(3)):
            with pytest.raises(type(error)) as caught, begin(tmp_path / "x.bin") as path:
                fail(error, path)
            told = str(caught.value)
            assert isinstance(error, RuntimeError) or f"{tmp_path}/{name}" in told
            assert "/proc/" not in told and "new.partial" not in told
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"'no/x\.bin'"), atomic_path(Path("no/x.bin")):
        pytest.fail("there is no such directory")


def test_a_block_that_changes_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    for number, begin in enumerate(BEGINS):
        monkeypatch.chdir(tmp_path)
        with begin(Path(str(number))) as path:
            (path.touch if begin is atomic_path else (path / "file").touch)()
            os.chdir("elsewhere")
    assert only(tmp_path) == ["0", "1", "elsewhere"] and not only(tmp_path / "elsewhere")


@linux
@pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="other owners need root")
def test_a_directory_that_is_exchanged_before_we_write(
    tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir

    def early(self: Path, *arguments: object) -> None:
        mkdir(self, *arguments)  # pyright: ignore[reportArgumentType]
        if self.name.endswith(".partial"):
            self.rename(tmp_path / "away")
            mkdir(self)
            os.chown(self, 65534, 65534)
            (self / ".x.bin.partial").symlink_to(victim)

    monkeypatch.setattr(Path, "mkdir", early)
    with (
        pytest.raises(OSError, match="Another user put something"),
        atomic_path(tmp_path / "x.bin") as partial,
    ):
        partial.write_text("new")
    assert victim.read_text() == "precious" and not (tmp_path / "x.bin").exists()


def test_what_a_file_replaces(tmp_path: Path, victim: Path) -> None:
    """A link, which is not followed, but no device and no pipe."""
    for name, target in (("a", victim), ("b", tmp_path / "nothing")):
        (tmp_path / name).symlink_to(target)
        with atomic_path(tmp_path / name) as partial:
            partial.write_text("new")
        assert not (tmp_path / name).is_symlink() and (tmp_path / name).read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to(os.devnull)
    for name in ("pipe", "null"):
        with pytest.raises(OSError, match="device or a pipe"), atomic_path(tmp_path / name):
            pytest.fail("it would have been replaced")
    assert victim.read_text() == "precious" and (tmp_path / "pipe").is_fifo()
    assert only(tmp_path) == ["a", "b", "null", "pipe", "victim"]


def test_logs_and_locks_follow_no_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "log.csv").symlink_to(victim)
    (tmp_path / "new.lock").symlink_to(tmp_path / "made")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a symbolic link"):
        add_row(tmp_path / "log.csv", {"step": 1.0})
    for name in ("log.csv", "new.lock"):
        with pytest.raises(OSError, match="a symbolic link"), locked(tmp_path / name):
            pytest.fail("that is another file's lock")
    with locked(tmp_path / "pipe"), locked(tmp_path / "made by it"):
        pass  # and it does not wait for a writer
    assert victim.read_text() == "precious" and not (tmp_path / "made").exists()


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        for name, write in WRITERS.items():
            with atomic_path(tmp_path / name) as partial:
                write(partial)
        with new_directory(tmp_path / "directory") as new:
            (new / "file").touch()
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == dict.fromkeys([*WRITERS, "file"], 0o640) | {"directory": 0o750}


def test_names_as_long_as_they_may_be(tmp_path: Path) -> None:
    with atomic_path(tmp_path / ("é" * 123)) as partial:  # a few bytes are for the temporary name
        partial.touch()
    with new_directory(tmp_path / "a" / ("à" * 127)) as new:
        (new / "file").touch()
    long = tmp_path / ("n" * 255)
    with pytest.raises(OSError, match="too long") as caught, atomic_path(long) as partial:
        partial.touch()
    assert caught.value.filename == str(long)
    for begin in BEGINS[1:]:  # which remove the parents that they made
        with pytest.raises(ValueError, match="bad model"), begin(tmp_path / "b" / "c" / "out"):
            raise ValueError("bad model")
        assert not (tmp_path / "b").exists()
