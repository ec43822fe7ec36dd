"""Files appear under their names whole or not at all, whatever ends the write."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dit_engine.io.files import atomic_path, save_tensors


@pytest.mark.parametrize("error", [None, OSError("full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("before", [[], [b"earlier"]])
def test_the_name_is_given_when_all_is_written(
    tmp_path: Path, before: list[bytes], error: BaseException | None
) -> None:
    path = tmp_path / "x.bin"
    for content in before:
        path.write_bytes(content)

    def found() -> list[bytes]:
        return [p.read_bytes() for p in tmp_path.iterdir() if p.is_file()]

    with suppress(OSError, KeyboardInterrupt), atomic_path(path) as partial:
        # A rename within one file system.
        assert partial.parent.stat().st_dev == tmp_path.stat().st_dev
        for content in (b"half", b"half, whole"):
            partial.write_bytes(content)
            assert found() == before  # and so it is if the process is killed now
        if error is not None:
            raise error
    assert found() == ([b"half, whole"] if error is None else before)
    assert {entry.name for entry in tmp_path.iterdir()} <= {path.name}


def test_tensors_come_back_with_their_metadata_and_usual_permissions(tmp_path: Path) -> None:
    path, other = tmp_path / "x.safetensors", tmp_path / "other"
    transposed = torch.arange(6.0).view(2, 3).T  # not contiguous
    save_tensors({"a": transposed}, path, {"k": "v"})
    assert torch.equal(load_file(path)["a"], transposed)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"k": "v"}
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode
