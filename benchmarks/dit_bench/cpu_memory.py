"""Resident memory of a lean forward, measured in a process of its own.

``python -m dit_bench.cpu_memory DIRECTORY`` loads a native model directory, builds the lean
backend, drops the model and runs a few steps, and prints what that took as one line of JSON.
Figures are bytes above a baseline: the same process after a lean run of a very small model, when
every library is loaded and every thread has its stack.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported
    from dit_engine.first import leave_out_of_path

    leave_out_of_path()
    from dit_engine.console.run import wait_briefly

    wait_briefly()

import gc
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dit_bench.cpu_forward import STEPS, random_model
from dit_engine.config import ModelConfig
from dit_engine.console.parser import Parser
from dit_engine.console.run import entry, run_command
from dit_engine.current_directory import python
from dit_engine.model import DiT

_INTERVAL_S = 0.002
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def needed_bytes(config: ModelConfig, batch: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the weights, of the modulations of ``STEPS`` steps and of one step's activations.

    Activations are those that must exist at one moment of a block: the residual stream, its norm,
    the branch's result, and the wider of qkv with the attended values and the MLP's hidden layer.
    """
    from dit_bench.cost import dit_cost, total

    d, size = config.hidden_size, dtype.itemsize
    wide = max(4 * d, config.mlp_hidden_size)
    distinct_labels = min(batch, batch // 2 + 1)  # half of the rows share the null class
    modulations = STEPS * distinct_labels * (6 * config.depth + 2) * d * size
    return {
        "weights": total(dit_cost(config)).parameters * size,
        "modulations": modulations,
        "activations": batch * config.num_tokens * (3 * d + wide) * size,
    }


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


class Sampler:
    """Largest resident memory seen while the block runs, read every few milliseconds."""

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
    needed = needed_bytes(config, batch, _DTYPES[precision])

    def above(values: dict[str, int]) -> dict[str, int]:
        return {key: value - baseline[key] for key, value in values.items()}

    return {
        "needed": needed,
        "baseline": baseline,
        "peak_while_loading": above(loading.peak),
        "after_load": above(loaded),
        "peak_while_running": above(running.peak),
        "ratio": above(running.peak)["total"] / sum(needed.values()),
    }


def measure(model: DiT, batch: int, precision: str, threads: int) -> dict[str, Any]:
    """Write ``model`` in ``precision`` to a temporary directory and measure it in a child.

    Raises RuntimeError, in one line, where the child fails.
    """
    from dit_engine.checkpoint.save import save_pretrained

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        save_pretrained(directory, model, dtype=_DTYPES[precision])
        command = python(
            "import runpy; runpy.run_module('dit_bench.cpu_memory', run_name='__main__')",
            str(directory), "--batch", str(batch), "--precision", precision,
            "--threads", str(threads),
        )  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise RuntimeError(lines[-1].removeprefix("error: "))
    return json.loads(result.stdout.strip().splitlines()[-1])


@entry
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("python -m dit_bench.cpu_memory", "Resident memory of a lean forward.")
    add = parser.add_argument
    add("directory", type=Path, help="a native model directory")
    add("--batch", type=int, default=2, help="rows of one step")
    add("--precision", default="bf16", choices=sorted(_DTYPES), help="of lean and of the files")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    arguments = parser.parse_args(argv)

    def command() -> int:
        values = (arguments.batch, arguments.precision, arguments.threads)
        print(json.dumps(measure_here(arguments.directory, *values)))
        return 0

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
