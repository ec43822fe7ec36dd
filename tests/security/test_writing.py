"""Nothing is written or removed through links of another user in the directory of an output."""

from __future__ import annotations

import os
import secrets
import stat
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

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


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("new"),
    "png": lambda path: Image.new("RGB", (2, 2)).save(path, "PNG"),
    "pt": lambda path: torch.save({"a": 1}, path),
    "safetensors": lambda path: save_tensors({"a": torch.ones(2)}, path),
}


def test_guessable_names_are_not_used(tmp_path: Path, victim: Path) -> None:
    """And the files have the usual permissions at the end."""
    before = os.umask(0o027)
    try:
        for kind, write in WRITERS.items():
            laid = tmp_path / f".{kind}.{os.getpid()}.partial"
            laid.symlink_to(victim)
            with atomic_path(tmp_path / kind) as partial:
                inside = stat.S_IMODE(partial.parent.stat().st_mode)
                write(partial)
            assert inside == 0o700  # nobody else's links can come to lie there
            assert victim.read_text() == "precious" and laid.is_symlink()
            assert stat.S_IMODE((tmp_path / kind).stat().st_mode) == 0o640
        with new_directory(tmp_path / "directory") as new:
            pass
        assert stat.S_IMODE((tmp_path / "directory").stat().st_mode) == 0o750 and not new.exists()
    finally:
        os.umask(before)


@pytest.mark.parametrize("thing", ["link", "directory"])
def test_even_a_guessed_name_is_not_followed(
    tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch, thing: str
) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda _: "guessed")
    laid, trap = tmp_path / ".x.bin.guessed.partial", tmp_path / "trap"
    trap.mkdir()
    (trap / ".x.bin.partial").symlink_to(victim)
    trap.rename(laid) if thing == "directory" else laid.symlink_to(trap)
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
        (new / "vae").mkdir()
        save_tensors({"a": torch.ones(2)}, new / "vae" / "a.safetensors")
        files = sorted(path.name for path in new.rglob("*"))
    assert files == ["a.safetensors", "vae"] and not only(tmp_path / "etc")
    assert begin is scratch_beside or (tmp_path / "model" / "vae" / "a.safetensors").exists()
    (hidden,) = tmp_path.glob(".*")
    assert len(only(hidden)) == 2  # what was put there is not removed either


@linux
@pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="other owners need root")
def test_a_directory_that_is_exchanged_before_we_write(
    tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir

    def early(self: Path, mode: int) -> None:
        mkdir(self, mode)
        self.rename(tmp_path / "away")
        mkdir(self)
        os.chown(self, 65534, 65534)
        (self / ".x.bin.partial").symlink_to(victim)

    monkeypatch.setattr(Path, "mkdir", early)
    said = "Another user put something"
    with pytest.raises(OSError, match=said), atomic_path(tmp_path / "x.bin"):
        pytest.fail("the directory is another's")


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


def test_errors_name_the_path_that_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for begin in BEGINS:
        name = f"{tmp_path}/{'.x.bin.' if begin is scratch_beside else 'x.bin'}"
        with pytest.raises(ValueError, match=f"^{name}.*: is bad$"), begin(tmp_path / "x.bin") as p:
            raise ValueError(f"{p}: is bad")
        with pytest.raises(OSError, match=f"No space: '{name}"), begin(tmp_path / "x.bin") as p:
            raise OSError(28, "No space", str(p))
    long = tmp_path / ("n" * 255)
    with pytest.raises(OSError, match="too long") as caught, atomic_path(long) as partial:
        partial.touch()
    assert caught.value.filename == str(long)
    (tmp_path / "a" / "b").mkdir(parents=True)
    for number, begin in enumerate(BEGINS):  # the block may change the current directory
        monkeypatch.chdir(tmp_path)
        with begin(Path("a", "b", f"{number}é" * 40)) as path:
            (path if begin is atomic_path else path / "file").touch()
            os.chdir("/")
    assert len(only(tmp_path / "a" / "b")) == 2
    for begin in BEGINS[1:]:  # which remove the parents that they made
        with pytest.raises(ValueError, match="bad model"), begin(tmp_path / "b" / "c" / "out"):
            raise ValueError("bad model")
        assert not (tmp_path / "b").exists()


def test_what_a_file_replaces(tmp_path: Path, victim: Path) -> None:
    """A link, which is not followed, but no device and no pipe."""
    (tmp_path / "a").symlink_to(victim)
    with atomic_path(tmp_path / "a") as partial:
        partial.write_text("new")
    assert not (tmp_path / "a").is_symlink() and victim.read_text() == "precious"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to(os.devnull)
    for name in ("pipe", "null"):
        with pytest.raises(OSError, match="device or a pipe"), atomic_path(tmp_path / name):
            pytest.fail("it would have been replaced")


def test_logs_and_locks_follow_no_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "log.csv").symlink_to(victim)
    (tmp_path / "new.lock").symlink_to(tmp_path / "made")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a symbolic link"):
        add_row(tmp_path / "log.csv", {"step": 1.0})
    with pytest.raises(OSError, match="a symbolic link"), locked(tmp_path / "new.lock"):
        pytest.fail("that is another file's lock")
    with locked(tmp_path / "pipe"), locked(tmp_path / "made by it"):
        pass  # and it does not wait for a writer
    assert victim.read_text() == "precious" and not (tmp_path / "made").exists()
