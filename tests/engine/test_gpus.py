"""Devices that do not exist and GPUs without some features, with stand-ins for torch.cuda."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_dit, tiny_engine, tiny_vae

from dit_bench import cli as bench
from dit_bench.contenders import bf16_eager
from dit_engine.backends import create_backend
from dit_engine.backends.lean.vae import LeanDecoder
from dit_engine.cli import generate as generate_command
from dit_engine.cli import train as train_command
from dit_engine.decode import LatentDecoder
from dit_engine.engine import Engine
from dit_engine.errors import BackendUnavailable
from dit_engine.training.loop import Budget
from dit_engine.training.run import TrainSettings, train
from dit_export import cli as export
from dit_export import cli_tensorrt
from dit_export.tensorrt.installed import Flavour
from dit_kernels import dispatch, triton

TURING = (7, 5)
GPU = torch.device("cuda", 0)
Gpus = Callable[[int, tuple[int, int]], None]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """Makes torch find this number of GPUs with this compute capability."""

    def find(count: int, capability: tuple[int, int] = (9, 0)) -> None:
        for name, found in (
            ("is_available", bool(count)), ("device_count", count), ("current_device", 0),
            ("get_device_capability", capability), ("get_device_name", "a GPU"),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, lambda *_, found=found: found)

    return find


def trained(device: Any) -> object:
    return train(TrainSettings(), Budget(1), Budget(1), Path("never"), device)


@pytest.mark.parametrize(
    "device", ["cuda:7", "cuda:1", "cuda:x", "cuda:-1", "cuda:128", "cuda:255", "cuda:256", "cuda:"]
)
def test_a_gpu_that_is_not_there_is_refused_in_one_line_that_names_those_that_are(
    device: str, gpus: Gpus, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch itself takes "cuda:256" for "cuda:0", and "cuda:255" for any GPU."""
    for count in (0, 1):
        gpus(count, (9, 0))
        allowed = ["cpu", *(["cuda", "cuda:0"] if count else [])]
        for make in (
            lambda: Engine(tiny_dit(), device=device),
            lambda: Engine.from_pretrained("builtin", device=device),
            lambda: trained(device),
        ):
            with pytest.raises(ValueError, match=f"^device '{device}' is not available; ") as said:
                make()
            names, _, reason = str(said.value).partition("allowed: ")[2].partition(" (torch ")
            why = "finds no GPU)" if torch.version.cuda else "is built without CUDA)"
            assert reason.endswith(why) if count == 0 else reason == ""
            assert [name for name in names.split(", ")
                    if name not in ("mps", "xpu")] == allowed  # fmt: skip
        for command in (
            lambda *given: generate_command.main(["--labels", "1", "-o", "never.png", *given]),
            lambda *given: train_command.main(["-o", "never", *given]),
            lambda *given: bench.main(["--model", "S/8", *given]),
            lambda *given: bench.main(["operators", *given]),
            lambda *given: bench.main(["fid", "one.npz", "other.npz", *given]),
        ):
            assert command("--device", device) == 2
            told = capsys.readouterr().err
            assert told.startswith(f"error: device '{device}' is not available; allowed: cpu")
            assert told.count("\n") == 1
    with pytest.raises(ValueError, match=r"^device 'cuda:-128' is not available"):
        Engine(tiny_dit(), device=torch.device("cuda", 128))


def test_the_gpu_of_an_export_is_checked_before_a_model_is_read(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_tensorrt, "choose_flavour", lambda _: Flavour("tensorrt", "t", "10.13"))
    gpus(1, (9, 0))
    for device, said in (
        ("7", "TensorRT 10.13 needs an NVIDIA GPU: torch finds 1, and number 7 is asked for (the"),
        ("cuda:7", "TensorRT 10.13 needs an NVIDIA GPU: torch finds 1, and number 7 is asked for"),
        ("cuda:x", "argument --device: 'cuda:x' is no GPU; give its number, such as 0 or cuda:0"),
    ):
        try:
            code: Any = export.main(["tensorrt", "--model", "nowhere", "-o", "never",
                                     "--device", device])  # fmt: skip
        except SystemExit as stopped:
            code = stopped.code
        told = capsys.readouterr().err
        assert code == 2 and said in told and told.count("\n") == 1


@pytest.mark.parametrize("backend", ["eager", "compile", "lean"])
def test_bfloat16_by_name_is_refused_before_ampere(
    backend: str, gpus: Gpus, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus(1, TURING)
    reason = "cuda:0 has compute capability 7.5, and bfloat16 needs 8.0"
    refused = f"^precision 'bf16': {reason}; fp16 and fp32 work there$"
    with pytest.raises(BackendUnavailable, match=refused):
        Engine(tiny_dit(), device="cuda").generate([1], backend=backend, precision="bf16")
    options = ["--backend", backend, "--precision", "bf16", "--device", "cuda:0"]
    assert generate_command.main(["--labels", "1", "-o", "never.png", *options]) == 2
    assert bench.main(["--model", "S/8", *options]) == 2
    assert capsys.readouterr().err == 2 * f"error: {refused[1:-1]}\n"
    with pytest.raises(ValueError, match=f"^training is in bfloat16: {reason}; device 'cpu' has"):
        trained(None)
    assert not Path("never").exists()


def test_quantised_products_that_a_gpu_does_not_have(gpus: Gpus) -> None:
    for capability, found in (((7, 5), "7.5"), ((8, 9), "8.9")):
        gpus(1, capability)
        for precision, said in (
            (
                "fp8",
                rf"cuda:0 has compute capability {found}, and fp8 products need 9.0 \(Hopper\)",
            ),
            (
                "int8",
                "int8 products are for the CPU, not for cuda:0; 'fp8' is for Hopper and later",
            ),
        ):
            with pytest.raises(BackendUnavailable, match=f"^precision '{precision}': {said}$"):
                create_backend("lean", tiny_dit(), precision, GPU)


def test_images_are_decoded_in_float32_where_there_is_no_bfloat16(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in float16, which Stable Diffusion's decoder overflows."""
    asked: list[torch.dtype] = []

    def make(vae: object, dtype: torch.dtype, device: object) -> Any:
        asked.append(dtype)
        return lambda z: z

    monkeypatch.setattr(LatentDecoder, "_cached", lambda self, make, dtype: make(0, dtype, 0))
    for capability in (TURING, (8, 0)):
        gpus(1, capability)
        for precision in ("fp16", "int8", "fp8"):
            LatentDecoder(tiny_vae(), GPU)(torch.zeros(1, 4, 4, 4), precision, make)
    wide, narrow = torch.float32, torch.bfloat16
    assert asked == [wide, wide, wide, wide, narrow, narrow]


def test_before_ampere_lean_runs_on_torch_references_and_warns_once(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(1, TURING)
    why = "compute capability 7.5: 8.0 is the oldest supported"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton.why_not(GPU) == why
    for operator in (*dispatch.NATIVE, "linear"):
        assert dispatch.chosen(operator, "auto", GPU) == "reference"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises((AssertionError, RuntimeError)):  # this torch has no CUDA
            create_backend("lean", tiny_dit(), "fp16", GPU)
    said = f"lean runs without its triton kernels, on slower torch references: {why}"
    assert [str(warning.message) for warning in told] == [said]


def test_the_references_of_a_step_do_not_synchronise() -> None:
    """Whole steps and a decode run on meta tensors with the references. They would fail if the host
    read a result, or if a CPU tensor took part, which a graph could not capture."""
    device = torch.device("meta")
    with pytest.warns(UserWarning, match="lean runs without its triton kernels"):
        lean = create_backend("lean", tiny_dit(), "fp16", device)
    labels, timesteps, scales = torch.tensor([1, 2, 10, 10]), torch.tensor([999]), torch.ones(2)
    with torch.inference_mode():
        step = lean.fuse(labels, timesteps, np.ones((1, 9)), scales, 3)
        assert step is not None
        z = torch.empty(2, 4, 8, 8, device=device)
        for guide in (True, False):
            after, x0 = step.guided_step(z, z, z, 0, guide)
            assert (after.device, after.dtype, x0.shape) == (device, torch.float32, z.shape)
        images = LeanDecoder(tiny_vae(), torch.float32, device)(z)
        assert (images.device, images.shape) == (device, (2, 3, 16, 16))


@pytest.mark.parametrize("options", [[], ["--check"]])
def test_a_gpu_run_needs_a_gpu_with_bfloat16(
    options: list[str], gpus: Gpus, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus(0)
    assert bench.main(["gpu", *options]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert told.err.startswith("error: no CUDA device: ")
    gpus(1, TURING)
    assert bench.main(["gpu", *options]) == 2
    said = "error: cuda:0 has compute capability 7.5, and bfloat16 needs 8.0, which dit-bench gpu "
    assert capsys.readouterr().err == f"{said}checks and measures\n"


def test_bounds_of_float16_need_no_bfloat16(gpus: Gpus) -> None:
    """dit-bench allows float16 an eighth of eager bfloat16's error, where there is bfloat16."""
    errors = {"bf16": 0.5, "fp16": 0.25}
    for capability, expected in ((TURING, 2.0), ((8, 0), 0.5)):
        gpus(1, capability)
        assert bf16_eager(lambda precision: errors[precision], GPU) == expected


def test_an_engine_on_the_cpu_asks_no_gpu(gpus: Gpus) -> None:
    gpus(1, TURING)
    assert (
        tiny_engine().generate([1], steps=1, precision="bf16", output="pt").images.isfinite().all()
    )
