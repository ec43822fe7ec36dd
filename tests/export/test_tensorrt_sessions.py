"""Running engines without a driver: profiles, buffers, CUDA graphs, streams and the backend."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_tensorrt import FakeEngine, FakeFlavour, FakeMemory, FakeTorchMemory
from tiny import tiny_dit, tiny_engine

from dit_engine.errors import BackendUnavailable
from dit_export.backends import tensorrt as backend
from dit_export.backends.tensorrt import Settings, TensorRTBackend, engine_pair, given_engines
from dit_export.onnx.graphs import Conditioner, Denoiser, signature
from dit_export.source import weights_hash
from dit_export.tensorrt import installed, session
from dit_export.tensorrt import memory as memories
from dit_export.tensorrt.engine_files import EngineFile, EngineKey, EngineRefused, write_engine
from dit_export.tensorrt.installed import CudaDevice, Flavour, choose_flavour
from dit_export.tensorrt.memory import make_memory
from dit_export.tensorrt.profiles import parse_profiles
from dit_export.tensorrt.session import LoadedEngine, Session, SessionPool, TensorRTEngine

GPU = CudaDevice("NVIDIA H200", "9.0")
RTX = Flavour("rtx", "tensorrt_rtx", "1.7.1.116")


def engine_file(folder: Path, graph: str = "scale", batch: str = "1,2,8", **changes) -> EngineFile:
    """An engine file that holds no engine: out = x · k."""
    key = EngineKey("0" * 64, "rtx", "1.7.1.116", "any", parse_profiles(batch.split(";")))
    values = {
        "path": folder / f"{graph}-0.engine", "graph": graph, "checkpoint": "", "dtype": "fp16",
        "key": key, "inputs": {"x": (-1, 3), "k": (-1,)}, "outputs": {"out": (-1, 3)},
        "sha256": "", "bytes": 0,
    }  # fmt: skip
    return write_engine(EngineFile(**(values | changes)), f"engine of {graph}".encode())


def scaled(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"out": inputs["x"] * inputs["k"][:, None]}


def load(folder: Path, captures: bool = False, **options) -> tuple[LoadedEngine, FakeEngine]:
    file = engine_file(folder, **options)
    fake = FakeEngine(file, scaled, {"k": "int64"})
    flavour: Any = FakeFlavour({file.read(): fake}, captures)
    return LoadedEngine(file, flavour, GPU), fake


def inputs(rows: int) -> dict[str, np.ndarray]:
    x = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3)
    return {"x": x, "k": np.arange(rows, dtype=np.int64) + 2}


def check(run: Session | SessionPool | TensorRTEngine, rows: int) -> np.ndarray:
    given = inputs(rows)
    out = run.run(**given) if isinstance(run, TensorRTEngine) else run.run(given)
    np.testing.assert_array_equal(out["out"], scaled(given)["out"])
    return out["out"]


def test_a_step_is_captured_once_and_its_outputs_belong_to_the_caller(tmp_path: Path):
    engine, fake = load(tmp_path)
    memory = FakeMemory(fake)
    run = Session(engine, memory)
    first = check(run, 2)
    run.run({"x": np.zeros((2, 3), np.float32), "k": np.ones(2, np.int64)})
    np.testing.assert_array_equal(first, scaled(inputs(2))["out"])
    check(run, 2)
    assert memory.log == [
        "enter", "synchronize", "capture", "enter", "replay", "enter", "replay",
    ]  # fmt: skip
    # Other shapes have a context and a graph of their own, and leave the first ones alone.
    check(run, 5)
    check(run, 2)
    assert len(fake.contexts) == 2 and memory.log.count("capture") == 2


@pytest.mark.parametrize(("graphs", "strategy"), [(True, 1), (False, None)])
def test_rtx_captures_by_itself(tmp_path: Path, graphs: bool, strategy: int | None):
    engine, fake = load(tmp_path, captures=True)
    memory = FakeMemory(fake)
    memory.captures = False
    run = Session(engine, memory, graphs)
    for _ in range(2):
        check(run, 3)
    assert fake.contexts[0].strategy == strategy and memory.log == ["enter", "enter"]
    engine, fake = load(tmp_path)
    with pytest.raises(ValueError, match="captures no CUDA graphs: use graphs=False"):
        Session(engine, memory)


def test_contexts_have_the_narrowest_profile_and_few_are_kept(tmp_path: Path):
    engine, fake = load(tmp_path, batch="1,2,64;1,1,2;16,32,64")
    run = Session(engine, FakeMemory(fake))
    for rows in (1, 3, 20, 4, 5):
        check(run, rows)
    assert [context.profile for context in fake.contexts] == [1, 0, 2, 0, 0]
    check(run, 3)
    assert len(fake.contexts) == 5
    check(run, 1)  # the one unused for longest had been dropped
    check(run, 3)
    assert len(fake.contexts) == 6


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (inputs(9), r"batch 9 is outside the engine's profile: batch 1 to 8 \(best at 2\)"),
        ({"x": inputs(2)["x"]}, r"inputs \['x'\]; \['k', 'x'\] are needed"),
        ({**inputs(2), "k": inputs(3)["k"]}, "inputs have different batches: "),
        ({**inputs(2), "x": np.zeros((2, 4))}, r"input x has shape \(2, 4\); \(-1, 3\)"),
        ({**inputs(2), "k": np.zeros((2, 1))}, r"input k has shape \(2, 1\); \(-1,\)"),
    ],
)
def test_bad_inputs_are_named(given: dict[str, np.ndarray], reason: str, tmp_path: Path):
    engine, fake = load(tmp_path)
    with pytest.raises(ValueError, match=reason):
        Session(engine, FakeMemory(fake)).run(given)
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
    pool = SessionPool(engine, lambda: FakeMemory(fake), streams=2, graphs=False)
    done: list[int] = []

    def work(rows: int) -> None:
        check(pool, rows)
        done.append(rows)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 2 and sorted(done) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="streams 0 is not a positive integer"):
        SessionPool(engine, lambda: FakeMemory(fake), streams=0)


def test_an_engine_that_cannot_be_loaded_is_refused(tmp_path: Path):
    file, other = engine_file(tmp_path), FakeFlavour({})

    def refused(flavour: Any, reason: str) -> None:
        with pytest.raises(EngineRefused, match=reason):
            LoadedEngine(file, flavour, GPU)

    unloadable = FakeFlavour({file.read(): None})
    refused(unloadable, r"cannot load it on NVIDIA H200 \(9\.0\): .* no such arch")
    other.version = "1.8.0.1"
    refused(other, r"built by TensorRT rtx 1\.7\.1\.116, this is rtx 1\.8")
    file.path.write_bytes(b"engine")
    refused(FakeFlavour({}), "truncated, 6 bytes in place of 15")


def test_memories_name_their_packages(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    for name, extra in (("cuda-core", "tensorrt"), ("pycuda", "pycuda")):
        with pytest.raises(ImportError, match=rf"pip install 'dit-engine\[{extra}\]'"):
            make_memory(name)
    with pytest.raises(ValueError, match="memory 'cupy': choose one of cuda-core, pycuda"):
        make_memory("cupy")
    assert memories.MEMORIES == ("cuda-core", "pycuda")


def test_engines_run_on_numpy_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = engine_file(tmp_path)
    with pytest.raises(EngineRefused, match="no engine of ours"):
        TensorRTEngine(tmp_path / "other.engine")
    monkeypatch.setattr(installed, "cuda_devices", lambda: ((), "libcuda.so.1 is not found"))
    with pytest.raises(BackendUnavailable, match="needs an NVIDIA GPU and its driver"):
        TensorRTEngine(file.path)
    fake = FakeEngine(file, scaled, {"k": "int64"})
    monkeypatch.setattr(installed, "cuda_devices", lambda: ((GPU,), ""))
    monkeypatch.setattr(session, "choose_flavour", lambda _: FakeFlavour({file.read(): fake}))
    monkeypatch.setattr(session, "make_memory", lambda *_: FakeMemory(fake))
    engine = TensorRTEngine(file.path, streams=2)
    for rows in (1, 8, 8):
        check(engine, rows)
    code = "import sys, dit_export.tensorrt.session; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(installed, "cuda_devices", lambda: ((), "libcuda.so.1 is not found"))
    for name in ("trt", "tensorrt", "tensorrt:///engines"):
        with pytest.raises(BackendUnavailable) as caught:
            tiny_engine().generate("ant", backend=name, steps=2)
        assert str(caught.value) == (
            "backend 'tensorrt' needs an NVIDIA GPU and its driver: libcuda.so.1 is not found"
        )
    monkeypatch.setattr(installed, "cuda_devices", lambda: ((GPU,), ""))
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BackendUnavailable, match=r"dit-engine\[tensorrt\]"):
        TensorRTBackend(tiny_dit(), "fp16", torch.device("cpu"))
    monkeypatch.setattr(backend, "choose_flavour", lambda _: RTX)
    with pytest.raises(BackendUnavailable, match="CUDA device of torch, and this is 'cpu'"):
        TensorRTBackend(tiny_dit(), "fp16", torch.device("cpu"))


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("DIT_TENSORRT_BATCH", "2,1,8", "DIT_TENSORRT_BATCH: batch '2,1,8'"),
        ("DIT_TENSORRT_STREAMS", "0", "DIT_TENSORRT_STREAMS '0'"),
        ("DIT_TENSORRT_REBUILD", "yes", "DIT_TENSORRT_REBUILD 'yes'"),
        ("DIT_TENSORRT_FLAVOUR", "trt", "DIT_TENSORRT_FLAVOUR 'trt': choose one of auto, "),
        ("DIT_TENSORRT_REBUILD", "1", "in the cache, and those of /engines were named: build"),
    ],
)
def test_bad_variables_are_named(
    variable: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=reason):
        TensorRTBackend(tiny_dit(), "fp16", torch.device("cuda"), "/engines")


@pytest.mark.parametrize(
    "batch",
    # The conditioner computes 12 rows before the loop: 8 and 4, the same padded to 5, twice 6, and
    # 9 and 3, padded to 4.
    ["1,2,8", "5,8,8", "1,1,6", "1,1,2;4,5,9"],
)
def test_the_pair_equals_the_model(batch: str, tmp_path: Path):
    model = tiny_dit()
    pools, fakes = {}, {}
    for name, module in {"conditioner": Conditioner(model), "denoiser": Denoiser(model)}.items():
        specs, outputs = signature(name, model.config, None)
        shapes = [
            {s.name: tuple(-1 if isinstance(n, str) else n for n in s.shape) for s in part}
            for part in (specs, outputs)
        ]
        profiles = batch if name == "conditioner" else "1,2,8"
        file = engine_file(tmp_path, name, profiles, inputs=shapes[0], outputs=shapes[1])

        def call(values, module=module, output=outputs[0].name):
            with torch.no_grad():
                result = module(*(torch.from_numpy(v.copy()) for v in values.values()))
            return {output: result.numpy()}

        fake = fakes[name] = FakeEngine(file, call, {s.name: s.dtype for s in specs})
        flavour: Any = FakeFlavour({file.read(): fake})
        loaded = LoadedEngine(file, flavour, GPU)
        pools[name] = SessionPool(loaded, lambda fake=fake: FakeTorchMemory(fake))
    pair = engine_pair(model.config, *pools.values(), torch.device("cpu"))
    labels = torch.tensor([3, 7, 3, model.config.null_class, 0])
    timesteps = torch.tensor([999, 500, 20])
    denoise = pair.prepare(labels, timesteps)
    x = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for step, m in ((0, 5), (1, 5), (2, 4)):
        with torch.no_grad():
            wanted = model(x[:m], timesteps[step].expand(m), labels[:m])
        got = denoise(x[:m].double(), step)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got.float(), wanted, rtol=1e-5, atol=1e-5)
    rows = sum(c.executions * c.shapes["t"][0] for c in fakes["conditioner"].contexts)
    assert rows == (13 if batch in ("5,8,8", "1,1,2;4,5,9") else 12)
    assert denoise(x[:0], 0).shape == (0, 8, 8, 8)
    too_many = pair.prepare(torch.zeros(9, dtype=torch.long), timesteps)
    with pytest.raises(ValueError, match=r"batch 9 is outside the engine's profile: batch \d to"):
        too_many(x[:1].expand(9, -1, -1, -1), 0)


def test_rows_between_two_profiles_are_padded_to_the_next() -> None:
    sizes = [(1, 2), (4, 16)]
    assert [backend.padding(rows, sizes) for rows in (1, 2, 3, 4, 16)] == [0, 0, 1, 0, 0]


def test_given_engines_must_fit(tmp_path: Path):
    model, other = tiny_dit(), tiny_dit(numerics="diffusers")
    assert weights_hash(other) == weights_hash(model)
    with pytest.raises(EngineRefused, match="holds no engine of conditioner"):
        given_engines(model, "fp16", tmp_path, RTX, GPU)
    claims = {"checkpoint": weights_hash(model), "model": model.config.to_dict()}
    files = {name: engine_file(tmp_path, name, **claims) for name in ("conditioner", "denoiser")}
    assert given_engines(model, "fp16", tmp_path, RTX, GPU) == files
    newer = Flavour("rtx", "tensorrt_rtx", "1.8.0.1")
    for asked, reason in (
        ((model, "bf16", tmp_path, RTX), "is in fp16; precision 'bf16' is asked"),
        ((other, "fp16", tmp_path, RTX), "has these weights with another config"),
        ((tiny_dit(seed=1), "fp16", tmp_path, RTX), "another model's weights"),
        ((model, "fp16", tmp_path, newer), r"this is rtx 1\.8\.0\.1; build it again"),
    ):
        with pytest.raises(EngineRefused, match=reason):
            given_engines(*asked, GPU)
    later = engine_file(tmp_path, path=tmp_path / "denoiser-1.engine", graph="denoiser", **claims)
    later.description.write_text(later.description.read_text().replace("1.7.1.116", "1.8.0.1"))
    assert given_engines(model, "fp16", tmp_path, RTX, GPU) == files  # not the newest, but it runs


@pytest.mark.slow
def test_cached_engines_are_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("DIT_ENGINE_CACHE", str(tmp_path))
    model = tiny_dit(depth=1)

    def engines(**environment: str) -> dict[str, EngineFile]:
        settings = Settings.read({"DIT_TENSORRT_BATCH": "1,2,2;4,8,16"} | environment)
        assert settings.profiles == parse_profiles(["1,2,2", "4,8,16"]) and settings.streams == 1
        return backend.cached_engines(model, "fp16", 0, choose_flavour("rtx"), settings)

    first = engines()
    times = {file.path: file.path.stat().st_mtime_ns for file in first.values()}
    assert [path.parent.name for path in times] == ["tensorrt", "tensorrt"]
    assert engines() == first
    assert {file.path: file.path.stat().st_mtime_ns for file in first.values()} == times
    denoiser = first["denoiser"]
    assert denoiser.checkpoint == weights_hash(model) and denoiser.dtype == "fp16"
    denoiser.path.write_bytes(b"")
    with pytest.raises(EngineRefused, match=r"truncated, 0 bytes .* DIT_TENSORRT_REBUILD=1"):
        engines()
    engines(DIT_TENSORRT_REBUILD="1")["denoiser"].read()
