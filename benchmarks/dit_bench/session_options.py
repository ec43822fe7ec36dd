"""The onnxruntime backend's session options beside every other that could matter, interleaved.

``python -m dit_bench.session_options --model builtin --batch 4`` exports a model's denoiser, opens
a session with each set of options and times them in turns; each result is compared with the first
one's. Exit code 1: another is better by more than 5 %, also at the low end of its ratio.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported
    from dit_engine.first import leave_out_of_path

    leave_out_of_path()
    from dit_engine.console.run import wait_briefly

    wait_briefly()

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_bench.environment import environment
from dit_bench.hardware import load_average, settle
from dit_bench.load import OtherLoad, warning
from dit_bench.outputs import write_json
from dit_bench.peers import relative_error
from dit_bench.timing import Interleaved, interleave
from dit_engine.config import ModelConfig
from dit_engine.console.output import check_file
from dit_engine.console.parser import Parser
from dit_engine.console.run import entry, run_command
from dit_engine.io.printable import say

OURS = "the backend's"
SAME = 1e-4  # relative: float32 in another order of summation
MARGIN = 1.05


def variants(threads: int) -> dict[str, Any]:
    """Name → onnxruntime's SessionOptions; but for the first two, `OURS` with one thing changed."""
    from dit_export.onnx.sessions import session_options

    ort = import_module("onnxruntime")
    level = ort.GraphOptimizationLevel

    def changed(change: Callable[[Any], object]) -> Any:
        options = session_options(threads)
        change(options)
        return options

    def entry(key: str, value: str) -> Any:
        return changed(lambda options: options.add_session_config_entry(key, value))

    return {
        OURS: session_options(threads),
        "no spinning": entry("session.intra_op.allow_spinning", "0"),
        "optimisation: extended": changed(
            lambda o: setattr(o, "graph_optimization_level", level.ORT_ENABLE_EXTENDED)
        ),
        "optimisation: basic": changed(
            lambda o: setattr(o, "graph_optimization_level", level.ORT_ENABLE_BASIC)
        ),
        "no arena": changed(lambda o: setattr(o, "enable_cpu_mem_arena", False)),
        "no memory pattern": changed(lambda o: setattr(o, "enable_mem_pattern", False)),
        "denormals as zero": entry("session.set_denormal_as_zero", "1"),
        "dynamic blocks": entry("session.dynamic_block_base", "4"),
    }


def functions(model: Any, batch: int, threads: int) -> dict[str, Callable[[], Tensor]]:
    """Name → one run of the denoiser graph on the same inputs, bound where they lie."""
    from dit_export.cache import cached_export
    from dit_export.onnx.export import ExportOptions
    from dit_export.onnx.graphs import modulation_width
    from dit_export.onnx.sessions import Session

    bundle = cached_export(model, ExportOptions("fp32", graphs=("conditioner", "denoiser")))
    config = model.config
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(
            batch, config.in_channels, config.input_size, config.input_size, generator=generator
        ),
        "modulations": torch.randn(batch, modulation_width(config), generator=generator) / 10,
    }
    shape = (batch, config.out_channels, config.input_size, config.input_size)

    def runner(options: Any) -> Callable[[], Tensor]:
        session = Session(bundle.file("denoiser"), torch.device("cpu"), threads, options)
        output = torch.empty(shape)

        def run() -> Tensor:
            session.run(inputs, {"output": output})
            return output

        return run

    return {name: runner(options) for name, options in variants(threads).items()}


def check(runs: dict[str, Callable[[], Tensor]]) -> None:
    """Raise RuntimeError if any of them computes something else than the first."""
    expected = runs[OURS]().clone()
    for name, run in runs.items():
        if not (error := relative_error(run(), expected)) <= SAME:
            raise RuntimeError(f"{name}: its result is {error:.1e} from that of {OURS}")


def rows(times: Interleaved) -> list[dict[str, Any]]:
    """Milliseconds of each, and `OURS` over it within rounds, quickest first."""
    made = [
        {
            "options": name,
            "ms": vars(times.spread(name)),
            "ours_over_it": vars(times.ratio_spread(OURS, name)),
        }
        for name in times.samples_ms
    ]
    return sorted(made, key=lambda row: row["ms"]["median"])


def model_of(name: str) -> Any:
    """A published size with random weights, or the built-in model."""
    from dit_bench.peers import randomise
    from dit_engine.engine import Engine
    from dit_engine.model import DiT

    if name == "builtin":
        return Engine.from_pretrained(name).model
    model = DiT(ModelConfig.named(name)).eval().requires_grad_(False)
    randomise(model)
    return model


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    load, others = load_average(), OtherLoad()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        runs = functions(model_of(arguments.model), arguments.batch, arguments.threads)
        check(runs)
        with others.sampled():
            times = interleave(runs, arguments.rounds)
    return {
        "model": arguments.model,
        "batch": arguments.batch,
        "threads": arguments.threads,
        "load_average": load,
        "other_load": others.mean,
        "rows": rows(times),
        **environment(),
    }


def build_parser() -> argparse.ArgumentParser:
    about = "The onnxruntime backend's session options beside others, on the CPU."
    parser = Parser("python -m dit_bench.session_options", about)
    add = parser.add_argument
    add("--model", default="builtin", help="a published size such as S/2, or 'builtin'")
    add("--batch", type=int, default=4, help="rows of a forward")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the session")
    add("--rounds", type=int, default=20, help="of interleaved timing")
    add("--json", type=Path, help="write every figure here")
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)

    def command() -> int:
        for name in ("batch", "threads", "rounds"):
            if getattr(arguments, name) < 1:
                raise ValueError(f"{name} {getattr(arguments, name)} is not positive")
        if arguments.json is not None:
            check_file(arguments.json)  # before the long run
            settle(print)
        report = measure(arguments)
        for row in report["rows"]:
            ratio = row["ours_over_it"]
            say(
                f"{row['options']:<36} {row['ms']['median']:8.2f} ms   {OURS} ÷ it "
                f"{ratio['median']:.3f} ({ratio['p5']:.3f}-{ratio['p95']:.3f})"
            )
        better = [row["options"] for row in report["rows"] if row["ours_over_it"]["p5"] > MARGIN]
        if (busy := warning(report)) is not None:
            say(busy)
            better = []
        for name in better:
            say(f"{name!r} is better by more than 5 % beyond the noise")
        if arguments.json is not None:
            write_json(report, arguments.json)
        return 1 if better else 0

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
