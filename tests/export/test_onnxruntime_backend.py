"""The onnxruntime backend makes eager's images, keeps its exports, and runs no other model's."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from exports import exported, quantized
from numerics import relative_error
from tiny import tiny_dit

from dit_engine import Engine
from dit_engine.backends.lean import conditioning
from dit_engine.errors import BackendUnavailable
from dit_export import cache
from dit_export.backends import onnxruntime as backend_module
from dit_export.backends.onnxruntime import OnnxRuntimeBackend, Session
from dit_export.bundle import Bundle
from dit_export.onnx.export import ExportOptions
from dit_export.source import weights_hash

CPU = torch.device("cpu")
PAIR = ("conditioner", "denoiser")


@pytest.fixture(scope="module")
def given() -> str:
    """The path of an export in fp32."""
    return str(exported("fp32", *PAIR).path)


def latents(engine: Engine, backend: str, **options: object) -> torch.Tensor:
    settings = {"steps": 6, "seeds": [3, 4, 5], "output": "latent", "sampler": "dpm++",
                "guidance_scale": [4.0, 1.0, 2.0]} | options  # fmt: skip
    return engine.generate([1, 7, 1], backend=backend, **settings).images


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "ddpm", "guidance_channels": None},
        {"sampler": "ddim", "eta": 0.5, "guidance_interval": (0.5, 5.0)},
        {"guidance_scale": 1.0},
    ],
)
def test_latents_are_eagers(given: str, options: dict[str, object]) -> None:
    engine = Engine(tiny_dit(), device="cpu", max_batch_size=2)
    expected = latents(engine, "eager", **options)
    assert relative_error(latents(engine, f"onnxruntime://{given}", **options), expected) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantised_latents_are_within_their_tolerance(precision: str) -> None:
    engine = Engine(tiny_dit(), device="cpu")
    address = f"onnxruntime://{quantized(precision, 'onnxruntime').path}"
    actual = latents(engine, address, precision=precision)
    assert 1e-4 < relative_error(actual, latents(engine, "eager")) < 0.5


def noted(monkeypatch: pytest.MonkeyPatch, output: str) -> list[torch.Tensor]:
    """The tensors into which sessions write ``output`` from now on."""
    written, run = [], Session.run

    def noting(self: Session, inputs: object, outputs: dict[str, torch.Tensor]) -> None:
        written.extend(tensor for name, tensor in outputs.items() if name == output)
        run(self, inputs, outputs)

    monkeypatch.setattr(Session, "run", noting)
    return written


def test_denoiser_takes_fewer_rows_and_other_dtypes(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With modulations of a few steps at a time: of 5 steps of 3 different labels, 3 fit."""
    width = 672
    monkeypatch.setattr(conditioning, "TABLE_BYTES", 4 * width * 3 * 3 + 5)
    backend, model = OnnxRuntimeBackend(tiny_dit(), "fp32", CPU, given), tiny_dit()
    labels, timesteps = torch.tensor([7, 2, 7, 10]), torch.tensor([900, 700, 500, 300, 100])
    tables, outputs = noted(monkeypatch, "modulations"), noted(monkeypatch, "output")
    denoiser = backend.prepare(labels, timesteps)
    generator, results = torch.Generator().manual_seed(0), []
    for m, step in ((4, 0), (2, 1), (3, 2), (4, 3), (1, 4)):
        x = torch.randn(m, 8, 8, 4, generator=generator).permute(0, 3, 1, 2)  # not contiguous
        with torch.inference_mode():
            expected = model(x, timesteps[step].expand(m), labels[:m])
        results.append((denoiser(x, step), expected))
        assert results[-1][0].data_ptr() == outputs[-1].data_ptr()  # bound, and not copied
    for actual, expected in results:  # nothing writes into an earlier result
        assert relative_error(actual, expected) < 1e-5
    assert [table.shape for table in tables] == [(9, width), (6, width)]
    assert denoiser(x.double(), 0).dtype == torch.float64
    assert denoiser(torch.zeros(0, 4, 8, 8), 0).shape == (0, 8, 8, 8)


def test_threads_are_those_of_the_engine(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(path: Path, device: torch.device, threads: int) -> Session:
        made.append(threads)
        return Session(path, device, threads)

    monkeypatch.setattr(backend_module, "Session", counted)
    engine = Engine(tiny_dit(), device="cpu", threads=2)
    for _ in range(2):
        latents(engine, f"onnxruntime://{given}", steps=2)
    assert made == [2, 2]  # two graphs, opened once


@pytest.mark.slow
def test_an_export_is_made_once_and_again_when_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIT_ENGINE_CACHE", str(tmp_path))
    shallow = tiny_dit(depth=1)  # which is quicker to export
    export, exports = cache.export_onnx, []

    def counted(*arguments: object, **options: object) -> Bundle:
        exports.append(arguments)
        return export(*arguments, **options)

    monkeypatch.setattr(cache, "export_onnx", counted)
    first = OnnxRuntimeBackend(shallow, "fp16", CPU).bundle
    assert first.path.parent == tmp_path / "onnx"
    assert OnnxRuntimeBackend(shallow, "fp16", CPU).bundle.manifest == first.manifest
    assert len(exports) == 1
    content = bytearray(first.file("denoiser").read_bytes())
    content[-1000] ^= 1  # one byte of the weights
    first.file("denoiser").write_bytes(content)
    engine = Engine(shallow, device="cpu")
    actual = latents(engine, "onnxruntime", precision="fp16")
    assert 1e-6 < relative_error(actual, latents(engine, "eager")) < 2e-2
    assert len(exports) == 2 and Bundle.open(first.path)  # whole


def test_models_that_differ_do_not_share_an_export() -> None:
    def key(dtype: str = "fp32", **changes: object) -> str:
        model = tiny_dit(**changes)
        return cache._key(model, ExportOptions(dtype, graphs=PAIR), weights_hash(model))

    keys = {key(), key("fp16"), key(numerics="diffusers"), key(seed=1)}
    assert len(keys) == 4 and key() in keys


@pytest.mark.slow
def test_an_export_of_another_model_is_refused(tmp_path: Path) -> None:
    int8 = quantized("int8", "onnxruntime").path
    part = exported("fp32", "conditioner", external_data_mib=0).path
    for model, precision, path, reason in (
        (tiny_dit(seed=1), "int8", int8, r": an export of another model$"),
        (tiny_dit(numerics="diffusers"), "int8", int8, r": an export of another model$"),
        (tiny_dit(), "fp32", int8, r": an export in int8; precision 'fp32' is asked$"),
        (tiny_dit(), "fp32", part, r"no graph 'denoiser'; it holds conditioner"),
    ):
        with pytest.raises(ValueError, match=reason):
            OnnxRuntimeBackend(model, precision, CPU, str(path))


def test_what_cannot_run_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    for precision, device, reason in (
        ("bf16", "cpu", r"^precision 'bf16': onnxruntime has no bfloat16"),
        ("fp32", "mps", r"runs on cpu and cuda, not on 'mps'$"),
        ("fp32", "cuda", r"pip install 'dit-engine\[onnx-gpu\]'$"),
    ):
        with pytest.raises(BackendUnavailable, match=reason):
            OnnxRuntimeBackend(tiny_dit(), precision, torch.device(device))


def test_onnxruntimes_own_refusal_of_memory_is_a_memory_error(given: str) -> None:
    """With which the engine halves the batch."""
    session = Session(Bundle.open(given).file("denoiser"), CPU, 1)

    class Refusing:
        io_binding = session.session.io_binding

        def run_with_iobinding(self, _: object) -> None:
            raise onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException(
                "Failed to allocate memory for requested buffer of size 8589934592"
            )

    refusing = copy.copy(session)
    refusing.session = Refusing()
    with pytest.raises(MemoryError, match=r"^onnxruntime: Failed to allocate memory"):
        refusing.run({"x": torch.zeros(1, 4, 8, 8)}, {})


def test_importing_the_parts_loads_no_optional_package() -> None:
    code = (
        "import sys, dit_export.tensorrt.session\n"
        "assert 'torch' not in sys.modules\n"
        "import dit_export.cli, dit_export.cli_onnx, dit_export.cli_tensorrt\n"
        "import dit_export.backends.onnxruntime, dit_export.backends.tensorrt\n"
        "packages = ('onnx', 'onnxscript', 'onnxruntime', 'onnx_ir', 'tensorrt_rtx')\n"
        "print([m for m in packages if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
