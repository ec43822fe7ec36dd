"""What a step of the lean forward allocates: nothing that stays, no more at once than it must."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_dit
from torch.profiler import ProfilerActivity, profile

from dit_engine.backends import create_backend
from dit_kernels.cpu import operators as native
from dit_kernels.cpu import product as native_product

ROWS, STEPS = 4, 5
SIZES = {"fp32": 4, "bf16": 2}


@pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")
@pytest.mark.parametrize("products", ["best", "library's"])
@pytest.mark.parametrize("precision", SIZES)
@torch.inference_mode()
def test_a_step_keeps_nothing_and_holds_what_it_must(
    precision: str, products: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if products == "library's":  # which float32 rows go through one by one
        monkeypatch.setattr(native_product, "why_not", lambda dtype: "not here")
    model = tiny_dit(hidden_size=192, num_heads=3, input_size=16, depth=3)
    backend, config = create_backend("lean", model, precision, torch.device("cpu")), model.config
    conditions = torch.tensor([1, 2, 10, 10]), torch.arange(100)
    fused = backend.fuse(*conditions, np.ones((100, 9)), torch.tensor([4.0, 2.0]), 3)
    assert fused is not None
    z = torch.randn(ROWS // 2, 4, 16, 16)
    for k in range(3):
        fused.guided_step(z, z, z, k, True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for k in range(3, 3 + STEPS):
            fused.guided_step(z, z, z, k, True)
    profiled.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    ordered = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    found = [e["args"]["Bytes"] for e in ordered]  # allocated above 0, released below
    assert sum(found) == 0
    made = sum(size > 0 for size in found)
    assert made % STEPS == 0  # every step the same
    d, width = config.hidden_size, (6 * config.depth + 2) * config.hidden_size
    if native_product.why_not(torch.float32) is None:  # in buffers that all steps share
        assert made // STEPS <= 8
        patches = ROWS * config.num_tokens * config.patch_size**2 * config.in_channels * 4
        assert max(accumulate(found)) <= 4 * patches  # and twice as many channels of the result
        return
    # Nine a block: the results of four products and of attention, and one more of each product's
    # that oneDNN needs beside it.
    forwards = ROWS if backend.one_by_one else 1
    assert made // STEPS <= forwards * (9 * config.depth + 12)
    # Beside the residual stream, which all steps share: the norm, the hidden layer, the branch's
    # result; and the step's modulations.
    needed = ROWS * (config.num_tokens * (d + 4 * d + d) + width) * SIZES[precision]
    assert max(accumulate(found)) <= 1.15 * needed  # oneDNN: its scratch
