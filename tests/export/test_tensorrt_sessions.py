"""Running engines without a driver: profiles, buffers, CUDA graphs, threads and the backend."""

from __future__ import annotations

import gc
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from fake_tensorrt import Arrays, FakeEngine, FakeMemory, fake_flavour
from tiny import tiny_dit, tiny_engine

from dit_engine.errors import BackendUnavailable
from dit_export.backends import tensorrt as backend
from dit_export.backends.tensorrt import TensorRTBackend, engine_pair, given_engines
from dit_export.onnx.graphs import Conditioner, Denoiser, signature
from dit_export.source import weights_hash
from dit_export.tensorrt import session
from dit_export.tensorrt.engine_files import EngineFile, EngineKey, EngineRefused, write_engine
from dit_export.tensorrt.installed import CudaDevice, Flavour, choose_flavour
from dit_export.tensorrt.profiles import parse_profiles
from dit_export.tensorrt.session import PycudaMemory, Session, TensorRTEngine

GPU = CudaDevice("NVIDIA H200", "9.0")
RTX = Flavour("rtx", "tensorrt_rtx", "1.7.1.116")


def engine_file(folder: Path, graph: str = "scale", batch: str = "1,2,8", **facts) -> EngineFile:
    """An engine file that holds no engine."""
    key = EngineKey("0" * 64, "rtx", "1.7.1.116", "any", parse_profiles(batch.split(";")))
    values = {"path": folder / f"{graph}-0.engine", "checkpoint": "", "dtype": "fp16"} | facts
    return write_engine(EngineFile(graph=graph, key=key, **values), b"engine")


def scaled(inputs: Arrays) -> Arrays:
    return {"out": inputs["x"] * inputs["k"][:, None]}


def load(folder: Path, captures: bool = False, **options) -> tuple[Session, FakeEngine]:
    """A session of the engine out = x · k."""
    file = engine_file(folder, **options)
    shapes = {"x": (-1, 3), "k": (-1,)}, {"out": (-1, 3)}
    fake = FakeEngine(file, scaled, *shapes, {"k": "int64"})
    memory: Any = FakeMemory(fake)
    return Session(file, fake_flavour(fake, captures), GPU, memory), fake


def inputs(rows: int) -> Arrays:
    x = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3)
    return {"x": x, "k": np.arange(rows, dtype=np.int64) + 2}


def check(run: Session, rows: int) -> np.ndarray:
    out = run.run(inputs(rows))["out"]
    np.testing.assert_array_equal(out, scaled(inputs(rows))["out"])
    return out


def test_a_step_is_captured_once_and_its_outputs_belong_to_the_caller(tmp_path: Path) -> None:
    run, fake = load(tmp_path)
    log: list[str] = run.memory.log  # pyright: ignore
    first = check(run, 2)
    run.run({"x": np.zeros((2, 3), np.float32), "k": np.ones(2, np.int64)})
    np.testing.assert_array_equal(first, scaled(inputs(2))["out"])
    check(run, 2)
    assert log == ["synchronize", "capture", "replay", "replay"]
    # Other shapes have a context and a graph of their own, and leave the first ones alone.
    check(run, 5)
    check(run, 2)
    assert len(fake.chosen) == 2 and log.count("capture") == 2


def test_rtx_captures_by_itself(tmp_path: Path) -> None:
    run, fake = load(tmp_path, captures=True)
    for _ in range(2):
        check(run, 3)
    assert fake.config.cuda_graph_strategy == 1
    assert run.memory.log == []  # pyright: ignore[reportAttributeAccessIssue]
    dropped = fake.latest
    gc.disable()  # a context's memory must not wait for the garbage collector
    try:
        for rows in range(4, 4 + session.CONTEXT_LIMIT):
            check(run, rows)
        assert dropped() is None
    finally:
        gc.enable()


def test_contexts_have_the_narrowest_profile_and_few_are_kept(tmp_path: Path) -> None:
    run, fake = load(tmp_path, batch="1,2,64;1,1,2;16,32,64")
    for rows in (1, 3, 20, 4, 5):
        check(run, rows)
    assert fake.chosen == [1, 0, 2, 0, 0]
    check(run, 3)
    assert len(fake.chosen) == 5
    check(run, 1)  # the one unused for longest had been dropped
    check(run, 3)
    assert len(fake.chosen) == 6
    with pytest.raises(ValueError, match="do not fit the engine"):
        run.run(inputs(65))


def test_threads_take_turns(tmp_path: Path) -> None:
    run, _ = load(tmp_path)

    def own(i: int) -> None:  # values of its own, so that another thread's would be seen
        mine = inputs(i % 3 + 1) | {"k": np.full(i % 3 + 1, i)}
        np.testing.assert_array_equal(run.run(mine)["out"], scaled(mine)["out"])

    write, memory = run.memory.write, cast("Any", run.memory)
    memory.write = lambda *values: (write(*values), time.sleep(1e-4))  # lets others in
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(own, range(60)))


def test_an_engine_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    for version, reason in (
        ("1.7.1.116", r"cannot load it on NVIDIA H200 .*: .* no such arch"),
        ("1.8.0.1", r"built by TensorRT rtx 1\.7\.1\.116, this is rtx 1\.8"),
    ):
        memory, flavour = cast("Any", None), fake_flavour(None, version=version)
        with pytest.raises(EngineRefused, match=reason):
            Session(engine_file(tmp_path), flavour, GPU, memory)


def test_engines_run_on_numpy_through_pycuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, fake = load(tmp_path)
    memory: Any = FakeMemory(fake)
    memory.gpu = GPU
    monkeypatch.setattr(session, "choose_flavour", lambda _: fake_flavour(fake))
    monkeypatch.setattr(session, "PycudaMemory", lambda _: memory)
    engine = TensorRTEngine(run.file.path)
    np.testing.assert_array_equal(engine.run(**inputs(8))["out"], scaled(inputs(8))["out"])
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(ImportError, match=r"pip install 'dit-engine\[pycuda\]'"):
        PycudaMemory()


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("trt", "tensorrt:///engines"):
        with pytest.raises(BackendUnavailable, match="CUDA device of torch, and this is 'cpu'"):
            tiny_engine().generate("ant", backend=name, steps=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(BackendUnavailable, match="needs an NVIDIA GPU: torch finds 0"):
        TensorRTBackend(tiny_dit(), "fp16", torch.device("cuda"))
    monkeypatch.setattr(backend, "require_device", lambda *_: GPU)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ImportError, match=r"dit-engine\[tensorrt\].*\[tensorrt-rtx\]"):
        TensorRTBackend(tiny_dit(), "fp16", torch.device("cuda"))
    for variable, value in (("BATCH", "2,1,8"), ("FLAVOUR", "trt")):
        with monkeypatch.context() as patch:
            patch.setenv(f"DIT_TENSORRT_{variable}", value)
            with pytest.raises(ValueError, match=f"DIT_TENSORRT_{variable}.*'{value}'"):
                TensorRTBackend(tiny_dit(), "fp16", torch.device("cuda"))


def test_the_pair_equals_the_model(tmp_path: Path) -> None:
    """The conditioner computes 12 rows before the loop: 8, and 4 that are padded to 8."""
    model = tiny_dit()
    sessions, fakes = [], {}
    for name, module in {"conditioner": Conditioner(model), "denoiser": Denoiser(model)}.items():
        specs = signature(name, model.config, None)
        shapes = [
            {s.name: tuple(-1 if isinstance(n, str) else n for n in s.shape) for s in part}
            for part in specs
        ]
        file = engine_file(tmp_path, name)

        def call(values: Arrays, module=module, output=specs[1][0].name) -> Arrays:
            with torch.no_grad():
                result = module(*(torch.from_numpy(v.copy()) for v in values.values()))
            return {output: result.numpy()}

        fake = fakes[name] = FakeEngine(file, call, *shapes, {s.name: s.dtype for s in specs[0]})
        memory: Any = FakeMemory(fake, lambda buffer: torch.from_numpy(buffer.copy()))
        sessions.append(Session(file, fake_flavour(fake), GPU, memory))
    pair = engine_pair(model.config, *sessions, torch.device("cpu"))
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
    assert fakes["conditioner"].rows == 16 and denoise(x[:0], 0).shape == (0, 8, 8, 8)


def test_given_engines_must_fit(tmp_path: Path) -> None:
    model, other = tiny_dit(), tiny_dit(numerics="diffusers")
    assert weights_hash(other) == weights_hash(model)
    claims = {"checkpoint": weights_hash(model), "model": model.config.to_dict()}
    files = {name: engine_file(tmp_path, name, **claims) for name in ("conditioner", "denoiser")}
    newer = Flavour("rtx", "tensorrt_rtx", "1.8.0.1")
    for asked, reason in (
        ((model, "bf16", tmp_path, RTX), "another dtype .'fp16', and 'bf16' is asked for"),
        ((other, "fp16", tmp_path, RTX), "was built of another model$"),
        ((tiny_dit(seed=1), "fp16", tmp_path, RTX), "was built of another checkpoint"),
        ((model, "fp16", tmp_path, newer), r"this is rtx 1\.8\.0\.1; build it again"),
    ):
        with pytest.raises(EngineRefused, match=reason):
            given_engines(*asked, GPU)
    later = engine_file(tmp_path, "denoiser", path=tmp_path / "denoiser-1.engine", **claims)
    later.description.write_text(later.description.read_text().replace("1.7.1.116", "1.8.0.1"))
    assert given_engines(model, "fp16", tmp_path, RTX, GPU) == files  # not the newest, but it runs


@pytest.mark.slow
def test_cached_engines_are_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("DIT_ENGINE_CACHE", str(tmp_path))
    model, profiles = tiny_dit(depth=1), parse_profiles(["1,2,2", "4,8,16"])

    def engines() -> dict[str, EngineFile]:
        return backend.cached_engines(model, "fp16", 0, choose_flavour("rtx"), profiles)

    first = engines()
    times = {file.path: file.path.stat().st_mtime_ns for file in first.values()}
    assert [path.parent.name for path in times] == ["tensorrt", "tensorrt"]
    assert engines() == first
    assert {file.path: file.path.stat().st_mtime_ns for file in first.values()} == times
    first["denoiser"].path.write_bytes(b"")
    assert engines()["denoiser"].read()  # a damaged one is built again
