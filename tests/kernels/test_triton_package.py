"""What the package says about machines that cannot run it, and what its import does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

import dit_kernels
from dit_kernels import dispatch, triton
from dit_kernels.triton import launch

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """A machine with triton and a GPU, whose compute capability is the list's last."""
    capability = [(9, 0)]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with (
        patch("importlib.util.find_spec", return_value=SimpleNamespace(origin="triton")),
        patch("torch.cuda.is_available", return_value=True),
        patch("torch.cuda.get_device_capability", side_effect=lambda _: capability[-1]),
    ):
        yield capability


def test_why_the_kernels_cannot_run(
    gpu: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert triton.why_not(CUDA) is None
    assert triton.why_not("cpu") == "Triton kernels are for CUDA devices, not for cpu"
    gpu.append((7, 5))
    assert triton.why_not(CUDA) == "compute capability 7.5: 8.0 is the oldest supported"
    with patch("torch.cuda.is_available", return_value=False):
        assert triton.why_not() == "torch finds no CUDA device"
    with patch("importlib.util.find_spec", return_value=None):
        assert triton.why_not() == "the package triton is not installed"
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the interpreter takes tensors of the CPU
    assert triton.why_not(torch.device("cpu")) is None


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_the_descriptor_variant_needs_hopper_and_auto_never_takes_it(
    gpu: list[tuple[int, int]], capability: tuple[int, int]
) -> None:
    gpu.append(capability)
    refused = f"compute capability {capability[0]}.{capability[1]}: 9.0 is the oldest with TMA"
    reason = dispatch.why_not("triton-tma", "attention", CUDA)
    assert reason == (None if capability >= (9, 0) else refused)
    for impl in ("auto", "triton"):
        assert dispatch.chosen("attention", impl, CUDA) == "triton"


def test_the_descriptor_variant_is_attentions_alone_and_refused_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(dit_kernels.Unavailable, match=r"^impl 'triton-tma': .*(CUDA|triton) "):
        dit_kernels.attention(torch.zeros(1, 4, 48, dtype=torch.float16), 2, impl="triton-tma")
    x = torch.zeros(1, 4, 48)
    refusal = "^impl 'triton-tma': gate_residual has no triton-tma implementation$"
    with pytest.raises(dit_kernels.Unavailable, match=refusal):
        dit_kernels.gate_residual(x, x, torch.zeros(1, 48), impl="triton-tma")


def test_an_image_whose_offsets_do_not_fit_is_refused() -> None:
    launched: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: object) -> object:
            return lambda x: launched.append(tuple(x.shape))

    for shape in ((64, 2**19, 1024), (1, 2**21, 1023), (2**40, 8)):
        launch.launch(Kernel(), 1, torch.empty(shape, device="meta"))
    assert len(launched) == 3
    for shape in ((1, 128, 4096, 4096), (3, 2**21, 1024)):
        with pytest.raises(ValueError, match=r"^shape \(.*: .* images of up to 2147483647 num"):
            launch.launch(Kernel(), 1, torch.empty(shape, device="meta"))
    assert len(launched) == 3


def test_import_leaves_triton_alone() -> None:
    code = "import sys, dit_kernels.triton; print('triton' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
    )  # fmt: skip
    assert run.stdout == "False\n"


def test_tiles_waste_nothing_at_published_widths() -> None:
    for width, tiles in {
        384: (256, 128),
        768: (512, 256),
        1024: (1024, 0),
        1152: (1024, 128),
    }.items():
        assert launch.row_tiles(width)[:2] == tiles
    for d, tiles in {1: (1, 0), 64: (64, 0), 72: (64, 16), 104: (128, 0), 48: (32, 16)}.items():
        assert launch.split(d, smallest_tail=16) == tiles
