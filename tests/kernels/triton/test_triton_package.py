"""What the package says about machines that cannot run it, and what its import does."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

import dit_kernels
from dit_kernels import dispatch as choose
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
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_the_descriptor_variant_needs_hopper(capability):
    device = torch.device("cuda")
    with (
        patch("torch.cuda.is_available", return_value=True),
        patch("torch.cuda.get_device_capability", return_value=capability),
    ):
        reason = choose.why_not("triton-tma", "attention", device)
        assert choose.why_not("triton", "attention", device) is None
    refused = f"compute capability {capability[0]}.{capability[1]}: 9.0 is the oldest with TMA"
    assert reason == (None if capability >= (9, 0) else refused)


def test_an_image_whose_offsets_do_not_fit_is_refused():
    launched: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda x: launched.append(tuple(x.shape))

    for shape in ((64, 2**19, 1024), (1, 2**21, 1023), (2**40, 8)):
        launch.launch(Kernel(), 1, torch.empty(shape, device="meta"))
    assert len(launched) == 3
    for shape in ((1, 128, 4096, 4096), (3, 2**21, 1024)):
        with pytest.raises(
            ValueError, match=r"^shape \(.*: .* images of up to 2147483647 numbers$"
        ):
            launch.launch(Kernel(), 1, torch.empty(shape, device="meta"))
    assert len(launched) == 3


def test_the_descriptor_variant_is_attentions_alone_and_refused_on_the_cpu():
    x = torch.zeros(1, 4, 48)
    with pytest.raises(dit_kernels.Unavailable, match=r"^impl 'triton-tma': .*(CUDA|triton) "):
        dit_kernels.attention(torch.zeros(1, 4, 48, dtype=torch.float16), 2, impl="triton-tma")
    refusal = "^impl 'triton-tma': gate_residual has no triton-tma implementation$"
    with pytest.raises(dit_kernels.Unavailable, match=refusal):
        dit_kernels.gate_residual(x, x, torch.zeros(1, 48), impl="triton-tma")


@pytest.mark.usefixtures("installed")
def test_auto_never_takes_a_variant():
    device = torch.device("cuda")
    with (
        patch("torch.cuda.is_available", return_value=True),
        patch("torch.cuda.get_device_capability", return_value=(9, 0)),
    ):
        for impl, taken in (("auto", "triton"), ("triton", "triton"), ("triton-tma",) * 2):
            assert choose.chosen("attention", impl, device) == taken


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
