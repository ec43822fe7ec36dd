"""The recorded forward beside the same forward that is not recorded: the same bits."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_dit
from torch import Tensor

from dit_engine.backends import create_backend
from dit_engine.backends.lean.backend import LeanBackend, LeanDenoiser
from dit_kernels.cpu import product as native_product

CPU = torch.device("cpu")
STEPS = 6
LABELS = torch.tensor([1, 2, 10, 10])

pytestmark = pytest.mark.skipif(
    native_product.why_not(torch.float32) is not None,
    reason=f"{native_product.why_not(torch.float32)}",
)


def lean(precision: str, **overrides: object) -> LeanBackend:
    backend = create_backend("lean", tiny_dit(**overrides), precision, CPU)
    assert isinstance(backend, LeanBackend) and backend.transformer.native
    return backend


def prepared(backend: LeanBackend) -> LeanDenoiser:
    return backend.prepare(LABELS, torch.linspace(999, 0, STEPS).round().long())


def unrecorded(denoiser: LeanDenoiser, x: Tensor, step: int, rows: int) -> Tensor:
    transformer = denoiser.backend.transformer
    config = transformer.config
    tokens = torch.empty(rows, config.num_tokens, config.hidden_size, dtype=transformer.dtype)
    for half in tokens.split(len(x)):
        transformer.embed(x, half)
    return transformer.forward(tokens, denoiser.table.step(step, rows))


@pytest.mark.parametrize("mlp_ratio", [4.0, 2.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@torch.inference_mode()
def test_steps_with_and_without_guidance(precision: str, mlp_ratio: float) -> None:
    """Rows change from step to step, as a guidance interval has it, and return."""
    denoiser = prepared(lean(precision, mlp_ratio=mlp_ratio))
    for step, (n, rows) in enumerate([(2, 2), (2, 4), (4, 4), (2, 2), (2, 4), (1, 1)]):
        x = torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(step))
        expected = unrecorded(denoiser, x, step, rows)
        assert torch.equal(denoiser.forward(x, step, rows), expected), step


@torch.inference_mode()
def test_denoisers_take_turns() -> None:
    backend = lean("bf16")
    first, second = prepared(backend), prepared(backend)
    for step in range(STEPS):
        for seed, denoiser in enumerate((first, second)):
            x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(denoiser.forward(x, step, 4), unrecorded(denoiser, x, step, 4))


@torch.inference_mode()
def test_results_are_the_callers_own() -> None:
    denoiser = prepared(lean("fp32", input_size=2))  # one token: unpatchify copies nothing
    x = torch.randn(4, 4, 2, 2)
    results = [denoiser(x, step) for step in range(STEPS)]
    again = prepared(denoiser.backend)
    for step, result in enumerate(results):
        assert torch.equal(result, again(x, step))
