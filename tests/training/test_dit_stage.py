"""The bfloat16 forward pass of training has the gradients of the float32 one."""

from __future__ import annotations

import torch
from tiny import tiny_dit

from dit_engine.training.dit_stage import forward_bf16


def test_gradients_reach_the_float32_weights_and_point_the_same_way() -> None:
    model = tiny_dit()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 4, 8, 8, generator=generator)
    target = torch.randn(4, 8, 8, 8, generator=generator)
    t, y = torch.tensor([0, 100, 500, 999]), torch.tensor([0, 3, 9, 10])

    def gradients(half: bool) -> dict[str, torch.Tensor]:
        model.zero_grad()
        out = forward_bf16(model, x, t, y).float() if half else model(x, t, y)
        assert out.shape == target.shape
        ((out - target) ** 2).mean().backward()
        return {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}

    exact, rounded = gradients(half=False), gradients(half=True)
    assert exact.keys() == rounded.keys()
    for name, gradient in exact.items():
        assert rounded[name].dtype == torch.float32
        error = (rounded[name] - gradient).norm() / gradient.norm()
        assert error < 0.1, (name, error)  # bfloat16 has 8 bits: 0.4 % an operation
