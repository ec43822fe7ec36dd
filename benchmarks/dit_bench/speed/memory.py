"""Memory of a lean forward on the CPU, in a process of its own.

Measured is resident memory, whose peak the system records, minus a baseline: the same process after
a lean run of a very small model, when every library is loaded and every thread has its stack.
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dit_bench.cost import dit_cost, total
from dit_bench.speed.forward import STEPS
from dit_bench.subjects import random_model
from dit_engine.config import ModelConfig
from dit_engine.current_directory import python
from dit_engine.model import DiT

BATCH = 2
CHILD = """
from dit_engine.console.run import wait_briefly
wait_briefly()
import json, sys
from dit_bench.speed.memory import measure_here
print(json.dumps(measure_here(sys.argv[1], int(sys.argv[2]))))
"""
_SELF = Path("/proc/self")


def resident_bytes(key: str = "VmRSS") -> dict[str, int]:
    """Resident memory of this process: "total", and of it "anonymous" (no file behind it).

    key: "VmHWM" for the peak since `peak_of` began; the memory of files in it is taken as of now.

    Raises OSError if the system has no /proc (Linux has it).
    """
    status = (_SELF / "status").read_text(encoding="utf-8")
    lines = re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE)
    kib = {name: int(value) for name, value in lines}
    of_files = kib["VmRSS"] - kib["RssAnon"]
    return {"total": kib[key] * 1024, "anonymous": (kib[key] - of_files) * 1024}


def peak_of(run: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    """What ``run`` returns, and the peak of `resident_bytes` meanwhile."""
    (_SELF / "clear_refs").write_text("5", encoding="ascii")  # resets VmHWM, see proc(5)
    return run(), resident_bytes("VmHWM")


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


def measure(model: DiT, threads: int) -> dict[str, Any]:
    """Measure a lean forward of ``model`` in bfloat16 with two rows, in a child process; "value" is
    the peak over what is needed. Raises a one-line RuntimeError if the child fails."""
    from dit_engine.checkpoint.save import save_pretrained

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        save_pretrained(directory, model, dtype=torch.bfloat16)
        command = python(CHILD, str(directory), str(threads))
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise RuntimeError(lines[-1])
    return json.loads(result.stdout.strip().splitlines()[-1])


def measure_here(directory: str, threads: int) -> dict[str, Any]:
    """The child's part of `measure`. ``directory`` holds a model in bfloat16."""
    from dit_engine.backends import create_backend
    from dit_engine.checkpoint import load_model

    torch.set_num_threads(threads)

    def start(model: DiT) -> Callable[[], Any]:
        backend = create_backend("lean", model, "bf16", torch.device("cpu"))
        labels = torch.tensor([0, model.config.null_class])
        denoise = backend.prepare(labels, torch.linspace(999, 0, STEPS).round().long())
        x = torch.zeros(BATCH, *model.config.latent_shape)
        return lambda: [denoise(x, k) for k in range(3)]

    def load() -> tuple[ModelConfig, Callable[[], Any]]:
        model = load_model(directory)
        return model.config, start(model)

    with torch.inference_mode():
        tiny = ModelConfig(depth=1, hidden_size=64, num_heads=1, patch_size=2, input_size=8)
        start(random_model(tiny))()
        gc.collect()
        baseline = resident_bytes()
        (config, run), loading = peak_of(load)
        gc.collect()
        loaded = resident_bytes()
        _, running = peak_of(run)
    needed = needed_bytes(config, BATCH, torch.bfloat16)

    def above(values: dict[str, int]) -> dict[str, int]:
        return {key: value - baseline[key] for key, value in values.items()}

    return {
        "value": above(running)["total"] / sum(needed.values()), "needed": needed,
        "baseline": baseline, "peak_while_loading": above(loading), "after_load": above(loaded),
        "peak_while_running": above(running),
    }  # fmt: skip
