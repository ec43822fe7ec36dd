"""The path of the data: which files one `Engine.generate` enters, and how deep it goes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from tiny import tiny_engine

from dit_kernels.cpu import operators as native

# Entered before the first native kernel runs, which is the patch embedding.
MOST_FILES_TO_A_KERNEL = 15
MOST_FILES = 25
MOST_FRAMES_TO_A_KERNEL = 11


def file_of(frame: FrameType) -> str | None:
    path = Path(frame.f_code.co_filename)
    ours = {"dit_engine", "dit_kernels"} & set(path.parts)
    return "/".join(path.parts[-3:]) if ours and path.suffix == ".py" else None


@pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")
def test_few_files_lead_from_generate_to_a_native_kernel() -> None:
    engine = tiny_engine()
    options = {"steps": 2, "seed": 0}
    engine.generate([3], **options)  # makes what an engine makes once
    entered: dict[str, int] = {}
    to_a_kernel: list[tuple[list[str], int]] = []  # (files so far, frames) at the first kernel

    def watch(frame: FrameType, event: str, arg: Any) -> None:
        if event != "call" or (file := file_of(frame)) is None:
            return
        entered[file] = entered.get(file, 0) + 1
        if not to_a_kernel and frame.f_code is native.embed.__code__:
            depth, above = 0, frame
            while above is not None:
                depth += file_of(above) is not None
                above = above.f_back
            to_a_kernel.append((sorted(entered), depth))

    sys.setprofile(watch)
    try:
        engine.generate([3], **options)
    finally:
        sys.setprofile(None)
    files, frames = to_a_kernel[0]
    assert len(files) <= MOST_FILES_TO_A_KERNEL, " ".join(files)
    assert frames <= MOST_FRAMES_TO_A_KERNEL
    assert len(entered) <= MOST_FILES, sorted(entered)
