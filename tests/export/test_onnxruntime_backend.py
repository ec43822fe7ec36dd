"""The onnxruntime backend makes eager's images, keeps its exports, and runs no other model's."""

from __future__ import annotations

import copy
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from exports import exported, quantized, random_dit
from numerics import relative_error
from tiny import tiny_dit

from dit_engine import Engine, backends
from dit_engine.errors import BackendUnavailable
from dit_export import cache
from dit_export.backends import onnxruntime as backend_module
from dit_export.backends.onnxruntime import OnnxRuntimeBackend
from dit_export.bundle import Bundle
from dit_export.onnx import files
from dit_export.onnx.sessions import Session

CPU = torch.device("cpu")
PAIR = ("conditioner", "denoiser")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry point, so that an installation older than it serves as well."""
    name = "dit_export.backends.onnxruntime:OnnxRuntimeBackend"
    point = EntryPoint("onnxruntime", name, backends.ENTRY_POINTS)

    def entry_points(group: str, name: str | None = None) -> list[EntryPoint]:
        return [point] if name in (None, "onnxruntime") else []

    monkeypatch.setattr(backends, "entry_points", entry_points)


@pytest.fixture(scope="module")
def given() -> str:
    """The address of an export in fp32 that other tests read too."""
    return str(exported("fp32").path)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache_folder(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_ENGINE_CACHE", str(cached))


def latents(engine: Engine, backend: str, **options: object) -> torch.Tensor:
    settings = {"steps": 6, "seeds": [3, 4, 5], "output": "latent",
                "guidance_scale": [4.0, 1.0, 2.0]} | options  # fmt: skip
    return engine.generate([1, 7, 1], backend=backend, **settings).images


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "dpm++"},
        {"sampler": "ddpm", "max_batch_size": 2},
        {"sampler": "ddim", "eta": 0.5, "guidance_interval": (0.5, 5.0)},
        {"sampler": "dpm++", "guidance_scale": 1.0},
        {"sampler": "ddpm", "guidance_channels": None},
    ],
)
def test_latents_are_eagers(given: str, options: dict[str, object]) -> None:
    options = dict(options)
    engine = Engine(random_dit(), device="cpu", max_batch_size=options.pop("max_batch_size", 32))
    expected = latents(engine, "eager", **options)
    actual = latents(engine, f"onnxruntime://{given}", **options)
    assert relative_error(actual, expected) < 1e-4


def test_fp16_latents_are_within_its_tolerance() -> None:
    engine = Engine(random_dit(), device="cpu")
    expected = latents(engine, "eager", sampler="dpm++")
    actual = latents(engine, "onnxruntime", sampler="dpm++", precision="fp16")
    assert 1e-6 < relative_error(actual, expected) < 2e-2


def test_int8_latents_resemble_eagers() -> None:
    bundle = quantized("int8", "onnxruntime")
    engine = Engine(random_dit(), device="cpu")
    expected = latents(engine, "eager", sampler="dpm++")
    address = f"onnxruntime://{bundle.path}"
    actual = latents(engine, address, sampler="dpm++", precision="int8")
    assert 1e-4 < relative_error(actual, expected) < 0.5


@pytest.mark.slow
def test_images_of_the_builtin_model_are_eagers() -> None:
    engine = Engine.from_pretrained("builtin", device="cpu")
    options = {"steps": 4, "sampler": "dpm++", "seed": 0, "output": "np"}
    expected = engine.generate(["planets", "waves"], backend="eager", **options).images
    actual = engine.generate(["planets", "waves"], backend="onnxruntime", **options).images
    difference = np.abs(actual.astype(int) - expected.astype(int))
    assert expected.std() > 20 and difference.max() <= 1 and (difference > 0).mean() < 1e-2


def test_modulations_in_chunks_are_the_same(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, backend = Engine(random_dit(), device="cpu"), f"onnxruntime://{given}"
    whole = latents(engine, backend, sampler="ddpm")
    monkeypatch.setattr(backend_module, "TABLE_BYTES", 4 * 672 * 6 * 4)  # 4 of the 6 steps
    assert relative_error(latents(engine, backend, sampler="ddpm"), whole) < 1e-6


def test_denoiser_takes_fewer_rows_and_other_dtypes(given: str) -> None:
    backend = OnnxRuntimeBackend(random_dit(), "fp32", CPU, given)
    labels, timesteps = torch.tensor([7, 2, 7, 10]), torch.tensor([900, 400])
    denoiser = backend.prepare(labels, timesteps)
    model = random_dit()
    generator = torch.Generator().manual_seed(0)
    for m, step in ((4, 0), (2, 1), (3, 0), (1, 1)):
        x = torch.randn(m, 8, 8, 4, generator=generator).permute(0, 3, 1, 2)  # not contiguous
        with torch.inference_mode():
            expected = model(x, timesteps[step].expand(m), labels[:m])
        assert relative_error(denoiser(x, step), expected) < 1e-5
        assert denoiser(x.double(), step).dtype == torch.float64
    assert denoiser(torch.zeros(0, 4, 8, 8), 0).shape == (0, 8, 8, 8)


def test_results_are_bound_and_stay_as_they_are(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph writes into the tensor that is returned, and never again into an earlier one."""
    backend = OnnxRuntimeBackend(random_dit(), "fp32", CPU, given)
    denoiser = backend.prepare(torch.tensor([1, 2]), torch.tensor([900, 400]))
    written: list[int] = []
    run = backend_module.Session.run

    def noted(self: object, inputs: object, outputs: dict[str, torch.Tensor]) -> None:
        written.extend(tensor.data_ptr() for name, tensor in outputs.items() if name == "output")
        run(self, inputs, outputs)

    monkeypatch.setattr(backend_module.Session, "run", noted)
    x = torch.randn(2, 4, 8, 8)
    first = denoiser(x, 0)
    before = first.clone()
    second = denoiser(x, 1)
    assert written == [first.data_ptr(), second.data_ptr()]
    assert torch.equal(first, before) and not torch.equal(second, before)


def test_modulations_take_the_bound_and_no_more(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 5 steps of 4 rows, of which two are alike, 3 fit: every bound buffer is counted."""
    monkeypatch.setattr(backend_module, "TABLE_BYTES", 4 * 672 * 4 * 3 + 5)
    backend = OnnxRuntimeBackend(random_dit(), "fp32", CPU, given)
    labels, timesteps = torch.tensor([7, 2, 7, 10]), torch.tensor([900, 700, 500, 300, 100])
    denoiser = backend.prepare(labels, timesteps)
    sizes: list[int] = []
    run = backend_module.Session.run

    def noted(self: object, inputs: object, outputs: dict[str, torch.Tensor]) -> None:
        sizes.extend(4 * t.numel() for name, t in outputs.items() if name == "modulations")
        run(self, inputs, outputs)

    monkeypatch.setattr(backend_module.Session, "run", noted)
    x = torch.randn(4, 4, 8, 8)
    for step in range(5):
        with torch.inference_mode():
            expected = random_dit()(x, timesteps[step].expand(4), labels)
        assert relative_error(denoiser(x, step), expected) < 1e-5
        assert denoiser._table.untyped_storage().nbytes() <= backend_module.TABLE_BYTES
    assert sizes == [4 * 672 * 4 * 3, 4 * 672 * 4 * 2]


def test_threads_are_those_of_the_engine(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    session = backend_module.Session

    def counted(path: Path, device: torch.device, threads: int) -> object:
        made.append(threads)
        return session(path, device, threads)

    monkeypatch.setattr(backend_module, "Session", counted)
    engine = Engine(random_dit(), device="cpu", threads=2)
    latents(engine, f"onnxruntime://{given}", sampler="dpm++")
    latents(engine, f"onnxruntime://{given}", sampler="dpm++")
    assert made == [2, 2]  # two graphs, opened once


def test_an_export_is_made_once_and_again_when_damaged(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shallow = tiny_dit(depth=1)  # which is quicker to export
    first = OnnxRuntimeBackend(shallow, "fp32", CPU).bundle
    assert first.path.parent == cached / "onnx"
    export, exports = cache.export_onnx, []

    def counted(*arguments: object, **options: object) -> Bundle:
        exports.append(arguments)
        return export(*arguments, **options)

    monkeypatch.setattr(cache, "export_onnx", counted)
    assert OnnxRuntimeBackend(shallow, "fp32", CPU).bundle.manifest == first.manifest
    assert exports == []
    with first.file("denoiser").open("r+b") as file:  # one byte of the weights
        file.seek(-1000, 2)
        byte = file.read(1)
        file.seek(-1000, 2)
        file.write(bytes([byte[0] ^ 1]))
    again = OnnxRuntimeBackend(shallow, "fp32", CPU).bundle
    assert len(exports) == 1 and again.path == first.path
    Bundle.open(again.path)  # whole


def test_models_that_differ_do_not_share_an_export() -> None:
    options = backend_module.ExportOptions("fp32", graphs=PAIR)
    model, other_t = random_dit(), tiny_dit(numerics="diffusers")
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other_t.state_dict().values(), strict=True)
    )
    keys = {cache._key(m, options) for m in (model, other_t, tiny_dit(seed=1))}
    keys.add(cache._key(model, backend_module.ExportOptions("fp16", graphs=PAIR)))
    assert len(keys) == 4 and cache._key(random_dit(), options) in keys


def test_an_export_of_another_model_is_refused(tmp_path: Path) -> None:
    bundle = quantized("int8", "onnxruntime")
    address = str(bundle.path)
    with pytest.raises(ValueError, match=r": an export of another model$"):
        OnnxRuntimeBackend(tiny_dit(seed=1), "int8", CPU, address)
    with pytest.raises(ValueError, match=r": an export of another model$"):
        OnnxRuntimeBackend(tiny_dit(numerics="diffusers"), "int8", CPU, address)
    with pytest.raises(ValueError, match=r": an export in int8; precision 'fp32' is asked$"):
        OnnxRuntimeBackend(random_dit(), "fp32", CPU, address)
    with pytest.raises(ValueError, match=r"no graph 'conditioner'; it holds transformer"):
        OnnxRuntimeBackend(random_dit(), "fp16", CPU, str(exported("fp16", "transformer").path))
    with pytest.raises(ValueError, match=r": not an export; manifest\.json is missing$"):
        OnnxRuntimeBackend(random_dit(), "fp32", CPU, str(tmp_path))


def test_what_cannot_run_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_dit()
    with pytest.raises(BackendUnavailable, match=r"^precision 'bf16': onnxruntime has no bfloat16"):
        OnnxRuntimeBackend(model, "bf16", CPU)
    with pytest.raises(BackendUnavailable, match=r"runs on cpu and cuda, not on 'mps'$"):
        OnnxRuntimeBackend(model, "fp32", torch.device("mps"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendUnavailable, match=r"pip install 'dit-engine\[onnx-gpu\]'$"):
        OnnxRuntimeBackend(model, "fp32", torch.device("cuda"))
    monkeypatch.setattr(files, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"^onnx is not installed: pip install 'dit-engine\[onnx"):
        OnnxRuntimeBackend(model, "fp32", CPU)


def test_running_out_of_memory_halves_the_batch(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, sizes = Engine(random_dit(), device="cpu"), []
    session = backend_module.Session
    run = session.run

    def small(self: object, inputs: dict[str, torch.Tensor], outputs: object) -> None:
        if "x" in inputs:
            sizes.append(len(inputs["x"]))
            if len(inputs["x"]) > 2:
                raise MemoryError("onnxruntime: Failed to allocate memory")
        run(self, inputs, outputs)

    monkeypatch.setattr(session, "run", small)
    with pytest.warns(UserWarning, match="out of memory with a batch of 3: going on with 1"):
        latents(engine, f"onnxruntime://{given}", sampler="dpm++")
    assert sizes[0] == 6 and set(sizes[1:]) == {2, 1}


def test_onnxruntimes_own_refusal_of_memory_is_a_memory_error(given: str) -> None:
    session = Session(Bundle.open(given).file("denoiser"), CPU, 1)

    class Refusing:
        def io_binding(self):
            return session.session.io_binding()

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
        "import sys, dit_export.onnx.export, dit_export.bundle, dit_export.cli\n"
        "import dit_export.cli_onnx\n"
        "import dit_export.backends.onnxruntime\n"
        "print([m for m in ('onnx', 'onnxscript', 'onnxruntime', 'onnx_ir') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
