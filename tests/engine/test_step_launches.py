"""Counts the launches of a captured step of XL/2, and checks that nothing else is launched.

The step runs on meta tensors, which have shapes but no values.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from played_cuda import counted_launches, played_cuda
from triton_workers import require_triton

from dit_engine.backends.capture import Turns
from dit_engine.backends.lean.choices import candidates
from dit_engine.backends.lean.conditioning import ModulationTable
from dit_engine.backends.lean.cuda_graphs import StepGraph
from dit_engine.backends.lean.forward import LeanTransformer
from dit_engine.config import ModelConfig
from dit_engine.model import DiT
from dit_kernels import attention_libraries, quantized, triton

GPU = torch.device("meta")
XL = ModelConfig.named("DiT-XL/2")
STEP = Counter(
    ["_embed_kernel", "_select_step_kernel", "_guided_step_kernel", "addmm"]  # the last layer
)
BLOCK = Counter(
    ["addmm"] * 3 + ["_addmm_activation"] + ["_attention_kernel"]
    + ["_gate_residual_layernorm_modulate_kernel"] * 2
)  # fmt: skip
FP8_BLOCK = Counter(
    ["_scaled_mm"] * 4 + ["_attention_kernel", "_quantize_rows_kernel"]
    + ["_gelu_quantize_rows_kernel"]
    + ["_gate_residual_layernorm_modulate_quantize_kernel"] * 2
)  # fmt: skip


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Meta tensors stand for those of a Hopper GPU, whose kernels are counted and not run."""
    require_triton()
    monkeypatch.setattr(triton, "why_not", lambda device=None: None)
    monkeypatch.setattr(quantized, "quantized_why_not", lambda kind, device: None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: GPU.index)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with played_cuda(), torch.inference_mode():
        yield


@functools.cache
def _model(depth: int = XL.depth) -> DiT:
    with GPU:
        return DiT(replace(XL, depth=depth))


def launches_of(
    rows: int, kind: str | None = None, steps: int = 3, draws: bool = False,
    transformer: LeanTransformer | None = None,
) -> tuple[Counter[str], ...]:  # fmt: skip
    """(name → launches of one step inside its graph, name → launches outside of it by all steps
    after the first)."""
    from triton.runtime.jit import KernelInterface

    n = rows // 2
    with counted_launches() as launches:

        def counted(kernel: Any, grid: object) -> Any:
            return lambda *_, **__: launches.counted(kernel.__name__)

        with patch.object(KernelInterface, "__getitem__", counted):
            transformer = transformer or LeanTransformer(_model(), torch.bfloat16, GPU, kind)
            graph = StepGraph(transformer, (n, True, 3), Turns(GPU), None)
            width = graph.modulation.shape[1]
            table = torch.empty(steps, rows, width, device=GPU, dtype=torch.bfloat16)
            label = torch.arange(rows, device=GPU)
            given = SimpleNamespace(index=label, steps_from=lambda step: (0, table))
            coefficients, scales = torch.ones(steps, 9, device=GPU), torch.ones(n, device=GPU)
            graph.start(cast(ModulationTable, given), coefficients, scales)
            z, x0 = torch.ones(2, n, *XL.latent_shape, device=GPU)
            noise = torch.ones_like(z) if draws else None
            z, x0 = graph(z, x0, noise, 0)
            launches.inside.clear()
            launches.outside.clear()
            for step in range(1, steps):
                z, x0 = graph(z, x0, noise, step)
    assert all(count % (steps - 1) == 0 for count in launches.inside.values())
    each = {name: count // (steps - 1) for name, count in launches.inside.items()}
    return Counter(each), launches.outside


def all_blocks(block: Counter[str]) -> Counter[str]:
    return Counter({name: XL.depth * count for name, count in block.items()})


@pytest.mark.parametrize("rows", [2, 64])
def test_seven_launches_per_block_and_five_more(rows: int) -> None:
    inside, outside = launches_of(rows)
    assert inside == all_blocks(BLOCK) + STEP + Counter(["_layernorm_modulate_kernel"])
    assert inside.total() == 7 * XL.depth + 5
    assert not outside


@pytest.mark.parametrize("rows", [2, 64])
def test_every_choice_needs_the_same_number_of_launches(rows: int) -> None:
    transformer = LeanTransformer(_model(depth=2), torch.bfloat16, GPU)
    found = candidates(transformer, rows)
    assert set(found) == {"qkv", "attention", "proj", "fc1", "fc2"}
    for part, ways in found.items():
        assert len(ways) > 2
        for name, way in ways.items():
            if name in attention_libraries.NAMES:  # they do not take tensors without values
                continue
            parts = replace(transformer.usual, **{part: way})
            transformer.parts = lambda rows, parts=parts: parts
            inside, outside = launches_of(rows, transformer=transformer)
            assert inside.total() == 7 * 2 + 5 and not outside, (part, name, inside)


def test_noise_is_copied_once_per_step() -> None:
    inside, outside = launches_of(2, draws=True)
    assert inside.total() == 7 * XL.depth + 5 and outside == {"copy_": 2}  # of two steps


def test_nine_launches_per_block_in_fp8() -> None:
    inside, outside = launches_of(2, "fp8")
    expected = all_blocks(FP8_BLOCK) + STEP + Counter(["_layernorm_modulate_quantize_kernel"])
    # The norm of the last layer, which is not quantised, stands for the last block's.
    expected["_gate_residual_layernorm_modulate_quantize_kernel"] -= 1
    expected["_gate_residual_layernorm_modulate_kernel"] += 1
    assert inside == expected and inside.total() == 9 * XL.depth + 5
    assert not outside
