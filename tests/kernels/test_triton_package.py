"""What the package says about machines that cannot run it, and how it cuts rows into tiles."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

import dit_kernels
from dit_kernels import dispatch, triton
from dit_kernels.triton import launch

CUDA = torch.device("cuda")


def test_why_the_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = [(9, 0)]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused = "^impl 'triton-tma': gate_residual has no triton-tma implementation$"
    x = torch.zeros(1, 4, 48)
    with pytest.raises(dit_kernels.Unavailable, match=refused):
        dit_kernels.gate_residual(x, x, torch.zeros(1, 48), impl="triton-tma")
    with (
        patch("importlib.util.find_spec", return_value=SimpleNamespace(origin="triton")),
        patch("torch.cuda.is_available", return_value=True),
        patch("torch.cuda.get_device_capability", side_effect=lambda _: capability[-1]),
    ):
        assert triton.why_not(CUDA) is None
        assert triton.why_not("cpu") == "Triton kernels are for CUDA devices, not for cpu"
        capability.append((7, 5))
        assert triton.why_not(CUDA) == "compute capability 7.5: 8.0 is the oldest supported"
        with patch("torch.cuda.is_available", return_value=False):
            assert triton.why_not() == "torch finds no CUDA device"
        with patch("importlib.util.find_spec", return_value=None):
            assert triton.why_not() == "the package triton is not installed"
        # The descriptor variant needs Hopper, and "auto" never takes it.
        for newer, reason in (
            ((8, 9), "compute capability 8.9: 9.0 is the oldest with TMA"), ((9, 0), None)
        ):  # fmt: skip
            capability.append(newer)
            assert dispatch.why_not("triton-tma", "attention", CUDA) == reason
            assert dispatch.chosen("attention", "auto", CUDA) == "triton"
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # the interpreter takes tensors of the CPU
        assert triton.why_not(torch.device("cpu")) is None


def test_an_image_whose_offsets_do_not_fit_is_refused() -> None:
    launched: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: object) -> object:
            return lambda x: launched.append(tuple(x.shape))

    launch.launch(Kernel(), 1, torch.empty(64, 2**19, 1024, device="meta"))
    launch.launch(Kernel(), 1, torch.empty(2**40, 8, device="meta"))
    with pytest.raises(ValueError, match=r"^shape \(.*: .* images of up to 2147483647 num"):
        launch.launch(Kernel(), 1, torch.empty(3, 2**21, 1024, device="meta"))
    assert len(launched) == 2


def test_tiles_waste_nothing_at_published_widths() -> None:
    for width, tiles in {384: (256, 128), 1024: (1024, 0), 1152: (1024, 128)}.items():
        assert launch.row_tiles(width)[:2] == tiles
    for d, tiles in {1: (1, 0), 64: (64, 0), 72: (64, 16), 104: (128, 0), 48: (32, 16)}.items():
        assert launch.split(d, smallest_tail=16) == tiles
