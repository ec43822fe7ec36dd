"""Resident memory: of a backend while it is built and first runs, and of a lean forward by itself.

On CUDA torch's allocator tells exactly. On the CPU it is the process's resident memory, read every
few milliseconds, above what it was before: freed memory that could not be given back to the system
is used again without showing, so a figure may be too small. A lean forward is therefore also
measured in a process of its own, above a baseline: the same process after a lean run of a very
small model, when every library is loaded and every thread has its stack.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dit_bench.contenders import float_dtype
from dit_bench.cost import dit_cost, total
from dit_bench.speed.forward import STEPS
from dit_bench.subjects import random_model
from dit_engine.config import ModelConfig
from dit_engine.current_directory import python
from dit_engine.model import DiT

MIB = 2**20
CHILD = """
from dit_engine.console.run import wait_briefly
wait_briefly()
import json, pathlib, sys
from dit_bench.speed.memory import measure_here
path, batch, precision, threads = sys.argv[1:]
print(json.dumps(measure_here(pathlib.Path(path), int(batch), precision, int(threads))))
"""
_INTERVAL_S = 0.002


class MemoryWatch:
    """Watches the first building and the first call of one function.

    record: "built_mib", taken by building, and "peak_mib", the most in the first call, above what
        was taken before building; empty until then, and where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.record: dict[str, float] = {}

    def around(self, build: Callable[[], Callable[[], Any]]) -> Callable[[], Callable[[], Any]]:
        """``build`` under watch, and the first call of what it gives."""

        def watched() -> Callable[[], Any]:
            before = self._now()
            function = build()
            after = self._now()
            if before is None or after is None:
                return function
            self.record["built_mib"] = round((after - before) / MIB, 1)

            def call() -> Any:
                if "peak_mib" in self.record:
                    return function()
                result, peak = self._peak_of(function)
                self.record["peak_mib"] = round((peak - before) / MIB, 1)
                return result

            return call

        return watched

    def _now(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc returns what is free to the system
        try:
            return resident_bytes()["total"]
        except OSError:
            return None

    def _peak_of(self, function: Callable[[], Any]) -> tuple[Any, int]:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            result = function()
            return result, torch.cuda.max_memory_allocated(self.device)
        with Sampler() as seen:
            result = function()
        return result, seen.peak["total"]


class Sampler:
    """The largest resident memory seen while the block runs."""

    def __enter__(self) -> Sampler:
        self.peak = resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL_S):
            self._look()

    def _look(self) -> None:
        now = resident_bytes()
        self.peak = {key: max(value, now[key]) for key, value in self.peak.items()}

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()


def resident_bytes(status: str | None = None) -> dict[str, int]:
    """Resident memory of this process: "total", and of it "anonymous" (no file behind it).

    Raises OSError where the system has no /proc (Linux has).
    """
    text = Path("/proc/self/status").read_text(encoding="utf-8") if status is None else status
    kib = {
        key: int(value.split()[0])
        for key, _, value in (line.partition(":") for line in text.splitlines())
        if key in ("VmRSS", "RssAnon")
    }
    return {"total": kib["VmRSS"] * 1024, "anonymous": kib["RssAnon"] * 1024}


def needed_bytes(config: ModelConfig, batch: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the weights, of the modulations of ``STEPS`` steps and of one step's activations.

    Activations are those that must exist at one moment of a block: the residual stream, its norm,
    the branch's result, and the wider of qkv with the attended values and the MLP's hidden layer.
    """
    d, size = config.hidden_size, dtype.itemsize
    wide = max(4 * d, config.mlp_hidden_size)
    distinct_labels = min(batch, batch // 2 + 1)  # half of the rows share the null class
    return {
        "weights": total(dit_cost(config)).parameters * size,
        "modulations": STEPS * distinct_labels * (6 * config.depth + 2) * d * size,
        "activations": batch * config.num_tokens * (3 * d + wide) * size,
    }


def measure(model: DiT, batch: int, precision: str, threads: int) -> dict[str, Any]:
    """Write ``model`` in ``precision`` to a temporary directory and measure it in a child process.

    "value" is the peak over what is needed. Raises RuntimeError, in one line, where the child
    fails.
    """
    from dit_engine.checkpoint.save import save_pretrained

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        save_pretrained(directory, model, dtype=float_dtype(precision))
        command = python(CHILD, str(directory), str(batch), precision, str(threads))
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise RuntimeError(lines[-1])
    return json.loads(result.stdout.strip().splitlines()[-1])


def measure_here(directory: Path, batch: int, precision: str, threads: int) -> dict[str, Any]:
    """What the child does. ``directory`` holds a model in the dtype of ``precision``."""
    from dit_engine.backends import create_backend
    from dit_engine.checkpoint import load_model

    torch.set_num_threads(threads)

    def start(model: DiT) -> Callable[[], Any]:
        config, device = model.config, torch.device("cpu")
        backend = create_backend("lean", model, precision, device)
        null = [config.null_class] * (batch - batch // 2)
        labels = torch.tensor([i % config.num_classes for i in range(batch // 2)] + null)
        denoise = backend.prepare(labels, torch.linspace(999, 0, STEPS).round().long())
        x = torch.zeros(batch, config.in_channels, config.input_size, config.input_size)
        return lambda: [denoise(x, k) for k in range(3)]

    with torch.inference_mode():
        tiny = ModelConfig(depth=1, hidden_size=64, num_heads=1, patch_size=2, input_size=8)
        start(random_model(tiny))()
        gc.collect()
        baseline = resident_bytes()
        with Sampler() as loading:
            model = load_model(directory)
            config = model.config
            run = start(model)
            del model
            gc.collect()
        loaded = resident_bytes()
        with Sampler() as running:
            run()
    needed = needed_bytes(config, batch, float_dtype(precision))

    def above(values: dict[str, int]) -> dict[str, int]:
        return {key: value - baseline[key] for key, value in values.items()}

    return {
        "value": above(running.peak)["total"] / sum(needed.values()),
        "needed": needed,
        "baseline": baseline,
        "peak_while_loading": above(loading.peak),
        "after_load": above(loaded),
        "peak_while_running": above(running.peak),
    }
