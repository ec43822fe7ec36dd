"""The profile of the lean forward: its parts are the model's, its shares sum to the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close_to_reference

from dit_bench.cpu_forward import random_model
from dit_bench.cpu_profile import Linears, forward_parts, shares
from dit_bench.cpu_report import format_profile
from dit_engine.backends.lean.forward import LeanTransformer
from dit_engine.config import ModelConfig
from dit_engine.model import DiT
from dit_kernels.quantized import quantized_why_not

TINY = ModelConfig(depth=2, hidden_size=64, num_heads=1, patch_size=2, input_size=8,
                   num_classes=10, numerics="diffusers")  # fmt: skip
PARTS = {"qkv": 10.0, "attention": 6.0, "proj": 5.0, "fc1": 12.0, "fc1 + gelu": 14.0, "fc2": 12.0,
         "row kernels": 3.0, "final linear": 1.0}  # fmt: skip


def test_shares_sum_to_the_forward() -> None:
    found = {part: (ms, share) for part, ms, share in shares(PARTS, 80.0)}
    assert found["linears"] == (40.0, 0.5)
    assert found["gelu"] == (2.0, 0.025)
    assert found["rest"] == (29.0, pytest.approx(0.3625))
    assert sum(share for _, share in found.values()) == pytest.approx(1)
    with pytest.raises(ValueError, match="forward 0 ms is not above 0"):
        shares(PARTS, 0)
    parts = [{"part": name, "ms": ms, "share": share} for name, (ms, share) in found.items()]
    profile = {"forward_ms": 80.0, "operators_ms": PARTS, "shares": parts}
    text = format_profile({"workload": "XL/2", "profile": profile})
    assert "rest               29.00 ms   36.2%" in text


def lean(model: DiT, quantized: str | None = None) -> LeanTransformer:
    return LeanTransformer(model, torch.float32, torch.device("cpu"), quantized)


def test_linears_alone_are_the_models() -> None:
    model = random_model(TINY)
    last = model.final_layer.linear
    with torch.inference_mode():
        linears = Linears(lean(model), 2)
        expected = F.linear(linears.last.double(), last.weight.double(), last.bias.double())
        assert_close_to_reference(linears.all(), expected, tolerance=1e-5)
        block = model.blocks[1].mlp.fc2
        wide = linears.wide.double()
        expected = F.linear(wide, block.weight.double(), block.bias.double())
        assert_close_to_reference(linears.blocks[1].fc2(linears.wide), expected, tolerance=1e-5)


@pytest.mark.parametrize("quantized", [None, "int8"])
def test_every_part_of_the_profile_runs(quantized: str | None) -> None:
    if quantized and (reason := quantized_why_not(quantized, torch.device("cpu"))):
        pytest.skip(reason)
    with torch.inference_mode():
        parts = forward_parts(lean(random_model(TINY), quantized), 2)
        for part in parts.values():
            part()
    assert shares(dict.fromkeys(parts, 1.0), 10.0)
