"""What the package says about machines that cannot run it, and what its import does."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from dit_kernels import triton
from dit_kernels.triton import launch


@pytest.fixture(autouse=True)
def _not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def installed():
    with patch("importlib.util.find_spec", return_value=SimpleNamespace(origin="triton")):
        yield


def test_without_the_package():
    with patch("importlib.util.find_spec", return_value=None):
        assert triton.why_not() == "the package triton is not installed"


@pytest.mark.usefixtures("installed")
def test_without_a_gpu():
    with patch("torch.cuda.is_available", return_value=False):
        assert triton.why_not() == "torch finds no CUDA device"


@pytest.mark.usefixtures("installed")
def test_a_tensor_of_the_cpu_beside_a_gpu():
    with patch("torch.cuda.is_available", return_value=True):
        assert triton.why_not("cpu") == "Triton kernels are for CUDA devices, not for cpu"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("capability", "usable"), [((7, 5), False), ((8, 0), True), ((9, 0), True)]
)
def test_capability(capability, usable):
    with (
        patch("torch.cuda.is_available", return_value=True),
        patch("torch.cuda.get_device_capability", return_value=capability),
    ):
        reason = triton.why_not(torch.device("cuda"))
    assert (
        reason is None
        if usable
        else reason == "compute capability 7.5: 8.0 is the oldest supported"
    )


@pytest.mark.usefixtures("installed")
def test_the_interpreter_takes_tensors_of_the_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton.why_not(torch.device("cpu")) is None


def test_import_leaves_triton_alone():
    code = "import sys, dit_kernels.triton; print('triton' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
    )  # fmt: skip
    assert run.stdout == "False\n"


@pytest.mark.parametrize(
    ("size", "tiles"),
    [(1, (1, 0)), (64, (64, 0)), (72, (64, 16)), (104, (128, 0)), (48, (32, 16)), (24, (32, 0))],
)
def test_split_of_head_dims(size, tiles):
    assert launch.split(size, smallest_tail=16) == tiles


@pytest.mark.parametrize(
    ("width", "tiles"),
    [(384, (256, 128)), (768, (512, 256)), (1024, (1024, 0)), (1152, (1024, 128))],
)
def test_published_widths_waste_nothing(width, tiles):
    assert launch.row_tiles(width)[:2] == tiles
    assert sum(tiles) == width
