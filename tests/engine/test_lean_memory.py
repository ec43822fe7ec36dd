"""What a step of the lean forward allocates: nothing that stays, no more at once than it must."""

from __future__ import annotations

import gc
import json
import resource
import sys
import tracemalloc
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_dit
from torch.profiler import ProfilerActivity, profile

from dit_engine.backends import create_backend
from dit_kernels.cpu import operators as native
from dit_kernels.cpu import product as native_product

ROWS, STEPS, PROFILED = 4, 640, 10
SIZES = {"fp32": 4, "bf16": 2}


class Steps:
    """A model's step k: a forward of `ROWS` rows, or a fused step of half as many images.

    forwards: calls of the transformer a step.
    """

    def __init__(self, precision: str, form: str, **overrides: object) -> None:
        model = tiny_dit(**overrides)
        side = model.config.input_size
        backend = create_backend("lean", model, precision, torch.device("cpu"))
        self.config, self.forwards = model.config, ROWS if backend.one_by_one else 1
        labels = torch.tensor([1, 2, 10, 10])
        conditions = labels, torch.linspace(999, 0, STEPS).round().long()
        denoise = backend.prepare(*conditions)
        x = torch.randn(ROWS, 4, side, side)
        z = torch.randn(ROWS // 2, 4, side, side)
        fused = backend.fuse(*conditions, np.ones((STEPS, 9)), torch.tensor([4.0, 2.0]), 3)
        assert fused is not None
        self.step: Callable[[int], object] = {
            "forward": lambda k: denoise(x, k),
            "fused step": lambda k: fused.guided_step(z, z, z, k, True),
        }[form]


def allocations(step: Callable[[int], object], folder: Path) -> list[int]:
    """Bytes of every allocation (> 0) and release (< 0) of `PROFILED` steps, in their order."""
    for k in range(3):
        step(k)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for k in range(3, 3 + PROFILED):
            step(k)
    profiled.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    found = [e for e in events if e.get("name") == "[memory]"]
    return [e["args"]["Bytes"] for e in sorted(found, key=lambda e: e["ts"])]


@pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")
@pytest.mark.parametrize(
    ("form", "products"),
    [("forward", "best"), ("fused step", "best"), ("forward", "library's")],
)
@pytest.mark.parametrize("precision", SIZES)
@torch.inference_mode()
def test_a_step_keeps_nothing_and_holds_what_it_must(
    precision: str, form: str, products: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if products == "library's":  # which float32 rows go through one by one
        monkeypatch.setattr(native_product, "why_not", lambda dtype: "not here")
    steps = Steps(precision, form, hidden_size=192, num_heads=3, input_size=16, depth=3)
    config, found = steps.config, allocations(steps.step, tmp_path)
    assert sum(found) == 0
    made = sum(size > 0 for size in found)
    assert made % PROFILED == 0  # every step the same
    d, width = config.hidden_size, (6 * config.depth + 2) * config.hidden_size
    if native_product.why_not(torch.float32) is None:  # in buffers that all steps share
        assert made // PROFILED <= 8
        patches = ROWS * config.num_tokens * config.patch_size**2 * config.in_channels * 4
        assert max(accumulate(found)) <= 4 * patches  # and twice as many channels of the result
        return
    # Nine a block: the results of four products and of attention, and one more of each product's
    # that oneDNN needs beside it.
    assert made // PROFILED <= steps.forwards * (9 * config.depth + 12)
    # Beside the residual stream, which all steps share: the norm, the hidden layer, the branch's
    # result; and the step's modulations.
    needed = ROWS * (config.num_tokens * (d + 4 * d + d) + width) * SIZES[precision]
    assert max(accumulate(found)) <= 1.15 * needed  # oneDNN: its scratch


@pytest.mark.skipif(sys.platform != "linux", reason="pages are counted as Linux does")
@torch.inference_mode()
def test_a_steps_memory_is_used_again() -> None:
    """Memory that went back to the system would cost a page fault for every page when it is asked
    for again: 6 MiB of activations here, of 4 KiB a page."""
    step = Steps("fp32", "forward", hidden_size=192, num_heads=3, input_size=32, depth=3).step
    for k in range(5):
        step(k)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for k in range(5, 5 + PROFILED):
        step(k)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 100 * PROFILED


@pytest.mark.parametrize("form", ["forward", "fused step"])
@torch.inference_mode()
def test_no_python_objects_pile_up(form: str) -> None:
    step = Steps("bf16", form).step
    each = STEPS // 8
    held = []
    tracemalloc.start()
    try:
        for k in range(STEPS):
            step(k)
            if (k + 1) % each == 0:
                gc.collect()
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # What piles up does so all the time; Python's lists of free tuples fill once, ever slower.
    growth = min(after - before for before, after in pairwise(held))
    assert growth < 10 * each, held  # bytes: less than any object a step
