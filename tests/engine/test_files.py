"""Files appear under their names whole or not at all, whatever ends the write."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dit_engine.io.files import atomic_path, save_tensors


@pytest.mark.parametrize("before", [None, b"earlier"])
def test_the_name_is_given_when_all_is_written(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "x.bin"
    if before is not None:
        path.write_bytes(before)

    def found() -> bytes | None:
        return path.read_bytes() if path.exists() else None

    with atomic_path(path) as partial:
        # A rename within one file system.
        assert partial.parent.stat().st_dev == tmp_path.stat().st_dev and found() == before
        partial.write_bytes(b"half")
        assert found() == before
        partial.write_bytes(b"half, whole")
        assert found() == before
    assert found() == b"half, whole" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("before", [None, b"earlier"])
def test_what_raises_leaves_the_file_as_it_was(
    tmp_path: Path, before: bytes | None, error: BaseException
) -> None:
    path = tmp_path / "x.bin"
    if before is not None:
        path.write_bytes(before)

    def interrupted() -> None:
        with atomic_path(path) as partial:
            partial.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if before is None else [before])


def test_a_block_that_writes_nothing_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"earlier")
    with pytest.raises(FileNotFoundError), atomic_path(path):
        pass
    assert path.read_bytes() == b"earlier"


KILLED = """
import os, signal, sys
from pathlib import Path
from dit_engine.io.files import atomic_path
with atomic_path(Path(sys.argv[1])) as partial:
    partial.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_killed_while_it_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"earlier")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL and path.read_bytes() == b"earlier"


def test_tensors_come_back_with_their_metadata_and_usual_permissions(tmp_path: Path) -> None:
    path, other = tmp_path / "x.safetensors", tmp_path / "other"
    transposed = torch.arange(6.0).view(2, 3).T  # not contiguous
    save_tensors({"a": transposed}, path, {"k": "v"})
    assert torch.equal(load_file(path)["a"], transposed)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"k": "v"}
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode
