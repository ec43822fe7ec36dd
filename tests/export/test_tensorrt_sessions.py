"""Running engines, but for the driver: profiles, buffers, CUDA graphs, streams and the backend."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_tensorrt import (
    FakeEngine,
    FakeFlavour,
    FakeMemory,
    FakeRtxEngine,
    FakeTorchMemory,
)
from tiny import tiny_dit, tiny_engine

from dit_engine.backends import create_backend
from dit_engine.errors import BackendUnavailable
from dit_export.backends import tensorrt as backend
from dit_export.backends.tensorrt import (
    EnginePair,
    Settings,
    TensorRTBackend,
    given_engines,
    padding,
)
from dit_export.onnx.graphs import signature
from dit_export.source import weights_hash
from dit_export.tensorrt import cuda_devices
from dit_export.tensorrt import memory as tensorrt_memory
from dit_export.tensorrt.cuda_devices import CudaDevice
from dit_export.tensorrt.engine_files import EngineFile, EngineKey, EngineRefused, write_engine
from dit_export.tensorrt.flavour import Flavour
from dit_export.tensorrt.memory import make_memory
from dit_export.tensorrt.profiles import parse_profiles
from dit_export.tensorrt.runtime import TensorRTEngine
from dit_export.tensorrt.session import CONTEXT_LIMIT, LoadedEngine, Session, SessionPool

GPU = CudaDevice("NVIDIA H200", "9.0")


def engine_file(folder: Path, graph: str = "scale", batch: str = "1,2,8", **changes) -> EngineFile:
    """An engine file of ours that holds no engine: out = x · k."""
    key = EngineKey("0" * 64, "rtx", "1.7.1.116", "any", parse_profiles(batch.split(";")))
    values = {
        "path": folder / f"{graph}-0.engine", "graph": graph, "checkpoint": "", "dtype": "fp16",
        "key": key, "inputs": {"x": (-1, 3), "k": (-1,)}, "outputs": {"out": (-1, 3)},
        "sha256": "", "bytes": 0,
    }  # fmt: skip
    return write_engine(EngineFile(**(values | changes)), f"engine of {graph}".encode())


def scaled(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"out": inputs["x"] * inputs["k"][:, None]}


def load(
    folder: Path, kind: type[FakeEngine] = FakeEngine, **options
) -> tuple[LoadedEngine, FakeEngine]:
    file = engine_file(folder, **options)
    fake = kind(file, scaled, {"k": "int64"})
    flavour = FakeFlavour({file.read(): fake}, rtx=kind is FakeRtxEngine)
    return LoadedEngine(file, flavour, GPU), fake  # pyright: ignore[reportArgumentType]


def inputs(rows: int) -> dict[str, np.ndarray]:
    x = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3)
    return {"x": x, "k": np.arange(rows, dtype=np.int64) + 2}


def test_outputs_are_computed_and_belong_to_the_caller(tmp_path: Path):
    engine, fake = load(tmp_path)
    session = Session(engine, FakeMemory([fake]), graphs=False)
    first = session.run(inputs(2))["out"]
    np.testing.assert_array_equal(first, [[0, 2, 4], [9, 12, 15]])
    session.run({"x": np.zeros((2, 3), np.float32), "k": np.ones(2, np.int64)})
    np.testing.assert_array_equal(first, [[0, 2, 4], [9, 12, 15]])


def test_a_step_is_captured_once_and_then_replayed(tmp_path: Path):
    engine, fake = load(tmp_path)
    memory = FakeMemory([fake])
    session = Session(engine, memory)
    for _ in range(3):
        np.testing.assert_array_equal(session.run(inputs(2))["out"], scaled(inputs(2))["out"])
    assert memory.log == [
        "enter", "synchronize", "capture", "enter", "replay", "enter", "replay",
    ]  # fmt: skip
    # Other shapes have a context and a graph of their own, and leave the first ones alone.
    np.testing.assert_array_equal(session.run(inputs(5))["out"], scaled(inputs(5))["out"])
    np.testing.assert_array_equal(session.run(inputs(2))["out"], scaled(inputs(2))["out"])
    assert len(fake.contexts) == 2 and memory.log.count("capture") == 2


def test_rtx_captures_by_itself(tmp_path: Path):
    engine, fake = load(tmp_path, FakeRtxEngine)
    memory = FakeMemory([fake])
    session = Session(engine, memory)
    for _ in range(2):
        np.testing.assert_array_equal(session.run(inputs(3))["out"], scaled(inputs(3))["out"])
    assert isinstance(fake, FakeRtxEngine) and [c.cuda_graph_strategy for c in fake.configs] == [1]
    assert "capture" not in memory.log and fake.contexts[0].executions == 2


def test_rtx_captures_nothing_without_graphs(tmp_path: Path):
    engine, fake = load(tmp_path, FakeRtxEngine)
    Session(engine, FakeMemory([fake]), graphs=False).run(inputs(3))
    assert isinstance(fake, FakeRtxEngine) and fake.configs == []


def test_contexts_have_the_narrowest_profile(tmp_path: Path):
    engine, fake = load(tmp_path, batch="1,2,64;1,1,2;16,32,64")
    session = Session(engine, FakeMemory([fake]))
    for rows in (1, 3, 20):
        session.run(inputs(rows))
    assert [context.profile for context in fake.contexts] == [1, 0, 2]


def test_few_contexts_are_kept(tmp_path: Path):
    engine, fake = load(tmp_path)
    session = Session(engine, FakeMemory([fake]), graphs=False)
    for rows in range(1, CONTEXT_LIMIT + 2):
        session.run(inputs(rows))
    made = len(fake.contexts)
    session.run(inputs(CONTEXT_LIMIT + 1))
    assert len(fake.contexts) == made
    session.run(inputs(1))
    assert len(fake.contexts) == made + 1


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (inputs(9), r"batch 9 is outside the engine's profile: batch 1 to 8 \(best at 2\)"),
        ({"x": inputs(2)["x"]}, r"inputs \['x'\]; \['k', 'x'\] are needed"),
        ({**inputs(2), "k": inputs(3)["k"]}, "inputs have different batches: "),
        (
            {**inputs(2), "x": np.zeros((2, 4), np.float32)},
            r"input x has shape \(2, 4\); \(-1, 3\)",
        ),
        ({**inputs(2), "k": np.zeros((2, 1), np.int64)}, r"input k has shape \(2, 1\); \(-1,\)"),
    ],
)
def test_bad_inputs_are_named(given, reason: str, tmp_path: Path):
    engine, fake = load(tmp_path)
    with pytest.raises(ValueError, match=reason):
        Session(engine, FakeMemory([fake])).run(given)
    assert fake.contexts == []


def test_streams_run_at_once_and_wait_when_all_are_taken(tmp_path: Path):
    engine, fake = load(tmp_path)
    lock, running, most = threading.Lock(), 0, 0

    def slow(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return scaled(values)

    fake.function = slow
    pool = SessionPool(engine, lambda: FakeMemory([fake]), streams=2, graphs=False)
    results: dict[int, np.ndarray] = {}

    def work(rows: int) -> None:
        results[rows] = pool.run(inputs(rows))["out"]

    threads = [threading.Thread(target=work, args=(rows,)) for rows in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 2
    for rows, result in results.items():
        np.testing.assert_array_equal(result, scaled(inputs(rows))["out"])
    with pytest.raises(ValueError, match="streams 0 is not a positive integer"):
        SessionPool(engine, FakeMemory, streams=0)


def test_engine_that_cannot_be_loaded_is_refused(tmp_path: Path):
    file = engine_file(tmp_path)
    with pytest.raises(
        EngineRefused, match=r"cannot load it on NVIDIA H200 \(9\.0\): .* no such arch"
    ):
        LoadedEngine(file, FakeFlavour({file.read(): None}), GPU)  # pyright: ignore
    other = FakeFlavour({})
    other.version = "1.8.0.1"
    with pytest.raises(
        EngineRefused, match=r"built by TensorRT rtx 1\.7\.1\.116, this is rtx 1\.8"
    ):
        LoadedEngine(file, other, GPU)  # pyright: ignore
    file.path.write_bytes(b"engine")
    with pytest.raises(EngineRefused, match="truncated, 6 bytes in place of 15"):
        LoadedEngine(file, FakeFlavour({}), GPU)  # pyright: ignore


def test_memory_that_captures_nothing_says_so(tmp_path: Path):
    engine, fake = load(tmp_path)
    memory = FakeMemory([fake])
    memory.captures = False
    with pytest.raises(ValueError, match="captures no CUDA graphs: use graphs=False"):
        Session(engine, memory)


def test_memories_name_their_packages(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(tensorrt_memory, "import_module", absent)
    with pytest.raises(ImportError, match=r"pip install 'dit-engine\[tensorrt\]'"):
        make_memory("cuda-core")
    with pytest.raises(ImportError, match=r"pip install 'dit-engine\[pycuda\]'"):
        make_memory("pycuda")
    with pytest.raises(ValueError, match="memory 'cupy': choose one of cuda-core, pycuda"):
        make_memory("cupy")


def test_runtime_needs_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_devices, "cuda_devices", lambda: ((), "libcuda.so.1 is not found"))
    with pytest.raises(BackendUnavailable, match="needs an NVIDIA GPU and its driver"):
        TensorRTEngine(engine_file(tmp_path).path)
    with pytest.raises(EngineRefused, match="no engine of ours"):
        TensorRTEngine(tmp_path / "other.engine")


def test_runtime_runs_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from dit_export.tensorrt import runtime as tensorrt_runtime

    file = engine_file(tmp_path)
    fake = FakeEngine(file, scaled, {"k": "int64"})
    monkeypatch.setattr(tensorrt_runtime, "require_device", lambda index: GPU)
    monkeypatch.setattr(
        tensorrt_runtime, "choose_flavour", lambda name: FakeFlavour({file.read(): fake})
    )
    monkeypatch.setattr(tensorrt_runtime, "make_memory", lambda name, device: FakeMemory([fake]))
    engine = TensorRTEngine(file.path, streams=2)
    for rows in (1, 8, 8):
        np.testing.assert_array_equal(
            engine.run(**inputs(rows))["out"], scaled(inputs(rows))["out"]
        )


def test_generate_without_a_driver_ends_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_devices, "cuda_devices", lambda: ((), "libcuda.so.1 is not found"))
    for name in ("trt", "tensorrt", "tensorrt:///engines"):
        with pytest.raises(BackendUnavailable) as caught:
            tiny_engine().generate("ant", backend=name, steps=2)
        assert str(caught.value) == (
            "backend 'tensorrt' needs an NVIDIA GPU and its driver: libcuda.so.1 is not found"
        )


def test_generate_without_the_package_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> Flavour:
        raise ImportError("tensorrt is not installed: pip install 'dit-engine[tensorrt]'")

    monkeypatch.setattr(cuda_devices, "cuda_devices", lambda: ((GPU,), ""))
    monkeypatch.setattr(backend, "choose_flavour", missing)
    with pytest.raises(BackendUnavailable, match=r"dit-engine\[tensorrt\]"):
        tiny_engine().generate("ant", backend="trt", steps=2)


def test_a_cpu_device_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_devices, "cuda_devices", lambda: ((GPU,), ""))
    monkeypatch.setattr(backend, "choose_flavour", lambda name: Flavour("rtx", "tensorrt_rtx", "1"))
    with pytest.raises(
        BackendUnavailable, match="runs on a CUDA device of torch, and this is 'cpu'"
    ):
        create_backend("trt", tiny_dit(), "fp16", torch.device("cpu"))


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("DIT_TENSORRT_BATCH", "2,1,8", "DIT_TENSORRT_BATCH: batch '2,1,8'"),
        ("DIT_TENSORRT_STREAMS", "0", "DIT_TENSORRT_STREAMS '0'"),
        ("DIT_TENSORRT_REBUILD", "yes", "DIT_TENSORRT_REBUILD 'yes'"),
        ("DIT_TENSORRT_FLAVOUR", "trt", "DIT_TENSORRT_FLAVOUR 'trt': choose one of auto, "),
    ],
)
def test_bad_variables_are_named(
    variable: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=reason):
        TensorRTBackend(tiny_dit(), "fp16", torch.device("cuda"))


def test_named_engines_are_not_built_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DIT_TENSORRT_REBUILD", "1")
    with pytest.raises(ValueError, match=r"in the cache, and those of /engines were named: build"):
        TensorRTBackend(tiny_dit(), "fp16", torch.device("cuda"), "/engines")


def test_settings_of_the_environment():
    settings = Settings.read({"DIT_TENSORRT_BATCH": "1,2,2;4,8,16", "DIT_TENSORRT_REBUILD": "1"})
    assert settings.profiles == parse_profiles(["1,2,2", "4,8,16"])
    assert (settings.flavour, settings.streams, settings.rebuild) == ("auto", 1, True)


def pair_of(model, folder: Path, batch: str) -> tuple[EnginePair, dict[str, FakeEngine]]:
    """The backend's two engines over the reference model, run through the fakes."""
    from dit_export.onnx.graphs import Conditioner, Denoiser

    modules = {"conditioner": Conditioner(model), "denoiser": Denoiser(model)}
    pools, fakes = {}, {}
    for name, module in modules.items():
        specs, outputs = signature(name, model.config, None)
        shapes = [
            {s.name: tuple(-1 if isinstance(n, str) else n for n in s.shape) for s in part}
            for part in (specs, outputs)
        ]
        file = engine_file(folder, name, batch, inputs=shapes[0], outputs=shapes[1])

        def call(values, module=module, output=outputs[0].name):
            with torch.no_grad():
                result = module(*(torch.from_numpy(v.copy()) for v in values.values()))
            return {output: result.numpy()}

        fake = FakeEngine(file, call, {s.name: s.dtype for s in specs})
        loaded = LoadedEngine(file, FakeFlavour({file.read(): fake}), GPU)  # pyright: ignore
        pools[name] = SessionPool(loaded, lambda fake=fake: FakeTorchMemory([fake]))
        fakes[name] = fake
    cpu = torch.device("cpu")
    return EnginePair(model, pools["conditioner"], pools["denoiser"], cpu), fakes


@pytest.mark.parametrize("batch", ["1,2,8", "4,8,8", "1,1,6"])
def test_the_pair_equals_the_model(batch: str, tmp_path: Path):
    model = tiny_dit()
    pair, fakes = pair_of(model, tmp_path, batch)
    labels = torch.tensor([3, 7, 3, model.config.null_class, 0])
    timesteps = torch.tensor([999, 500, 20, 0])
    denoise = pair.prepare(labels, timesteps)
    x = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for step, m in ((0, 5), (1, 5), (2, 4), (3, 4)):
        with torch.no_grad():
            wanted = model(x[:m], timesteps[step].expand(m), labels[:m])
        got = denoise(x[:m], step)
        assert got.dtype == x.dtype
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    # 16 pairs of a time step and a label, before the loop.
    largest = fakes["conditioner"].file.key.profiles[0].batch.largest
    rows = sum(c.executions * c.shapes["t"][0] for c in fakes["conditioner"].contexts)
    assert 16 <= rows <= -(-16 // largest) * largest
    assert denoise(x[:0], 0).shape == (0, 8, 8, 8)
    too_many = pair.prepare(torch.zeros(9, dtype=torch.long), timesteps)
    with pytest.raises(ValueError, match=r"batch 9 is outside the engine's profile: batch \d to"):
        too_many(x[:1].expand(9, -1, -1, -1), 0)


def test_rows_between_two_profiles_are_padded_to_the_next() -> None:
    sizes = [(1, 2), (4, 16)]
    assert [padding(rows, sizes) for rows in (1, 2, 3, 4, 16)] == [0, 0, 1, 0, 0]


def test_given_engines_must_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny_dit()
    flavour, weights = Flavour("rtx", "tensorrt_rtx", "1.7.1.116"), weights_hash(model)
    with pytest.raises(EngineRefused, match="holds no engine of conditioner"):
        given_engines(model, "fp16", tmp_path, flavour, GPU)
    files = {
        name: engine_file(tmp_path, name, checkpoint=weights, model=model.config.to_dict())
        for name in ("conditioner", "denoiser")
    }
    assert given_engines(model, "fp16", tmp_path, flavour, GPU) == files
    with pytest.raises(EngineRefused, match="is in fp16; precision 'bf16' is asked"):
        given_engines(model, "bf16", tmp_path, flavour, GPU)
    other = tiny_dit(numerics="diffusers")
    assert weights_hash(other) == weights
    with pytest.raises(EngineRefused, match="has these weights with another config"):
        given_engines(other, "fp16", tmp_path, flavour, GPU)
    with pytest.raises(EngineRefused, match="another model's weights"):
        given_engines(tiny_dit(seed=1), "fp16", tmp_path, flavour, GPU)
    newer = Flavour("rtx", "tensorrt_rtx", "1.8.0.1")
    with pytest.raises(EngineRefused, match=r"this is rtx 1\.8\.0\.1; build it again"):
        given_engines(model, "fp16", tmp_path, newer, GPU)


@pytest.mark.slow
def test_cached_engines_are_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("onnxscript")
    from dit_export.backends.tensorrt import cached_engines
    from dit_export.tensorrt.flavour import choose_flavour

    monkeypatch.setenv("DIT_ENGINE_CACHE", str(tmp_path))
    model = tiny_dit(depth=1)
    settings = Settings.read({"DIT_TENSORRT_BATCH": "1,2,8"})
    first = cached_engines(model, "fp16", 0, choose_flavour("rtx"), settings)
    times = {file.path: file.path.stat().st_mtime_ns for file in first.values()}
    assert sorted(path.parent.name for path in times) == ["tensorrt", "tensorrt"]
    assert cached_engines(model, "fp16", 0, choose_flavour("rtx"), settings) == first
    assert {file.path: file.path.stat().st_mtime_ns for file in first.values()} == times
    denoiser = first["denoiser"]
    assert denoiser.checkpoint == weights_hash(model) and denoiser.dtype == "fp16"
    first["denoiser"].path.write_bytes(b"")
    with pytest.raises(EngineRefused, match=r"truncated, 0 bytes .* DIT_TENSORRT_REBUILD=1"):
        cached_engines(model, "fp16", 0, choose_flavour("rtx"), settings)
    rebuild = Settings.read({"DIT_TENSORRT_BATCH": "1,2,8", "DIT_TENSORRT_REBUILD": "1"})
    cached_engines(model, "fp16", 0, choose_flavour("rtx"), rebuild)["denoiser"].read()


def test_the_runtime_is_free_of_torch(tmp_path: Path):
    import subprocess
    import sys

    code = "import sys, dit_export.tensorrt.runtime; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
