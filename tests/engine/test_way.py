"""The path of the data: how many files one `Engine.generate` enters."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from tiny import tiny_engine

from dit_kernels.cpu import operators as native

MOST_FILES_TO_A_KERNEL = 15  # before the first native kernel runs, which is the patch embedding
MOST_FILES = 26


@pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")
def test_few_files_lead_from_generate_to_a_native_kernel() -> None:
    engine, options = tiny_engine(), {"steps": 2, "seed": 0}
    engine.generate([3], **options)  # makes what an engine makes once
    entered, to_a_kernel = set[Path](), list[int]()

    def watch(frame: FrameType, event: str, arg: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and {"dit_engine", "dit_kernels"} & set(path.parts):
            entered.add(path)
            if frame.f_code is native.embed.__code__:
                to_a_kernel.append(len(entered))

    sys.setprofile(watch)
    try:
        engine.generate([3], **options)
    finally:
        sys.setprofile(None)
    assert to_a_kernel[0] <= MOST_FILES_TO_A_KERNEL and len(entered) <= MOST_FILES, sorted(entered)
