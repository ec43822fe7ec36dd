"""``dit-bench``: cost, latency and peers of a Diffusion Transformer on this machine.

Without one of the words of `COMMANDS`, models are measured: ``dit-bench --model XL/2 …``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module

from dit_engine.console.parser import Parser
from dit_engine.console.run import entry, run_command
from dit_engine.io.printable import say

COMMANDS = {
    "cpu": ("dit_bench.speed.cpu", "The lean forward beside its peers on this CPU."),
    "gpu": ("dit_bench.speed.gpu", "Check and time DiT Engine on a CUDA device."),
    "operators": ("dit_bench.speed.operators", "Check the operators, then time them."),
    "gflops": ("dit_bench.cost", "The paper's table of twelve models beside ours."),
    "compare": ("dit_bench.compare", "Two reports: which times are regressions."),
    "parity": ("dit_bench.quality.parity", "Images beside eager float32's, noise being equal."),
    "quality": ("dit_bench.quality.fd_lite0", "FD-Lite0 of a model against held-out images."),
    "documents": ("dit_bench.show.markdown", "Write the tables of reports into documents."),
    "fid": ("dit_bench.quality.fid", "FID and its kin of two sets of images."),
}
"""Word → (module with add_arguments(parser) and run(arguments), what it does)."""
ABOUT = "Measure a Diffusion Transformer: cost, latency, peers. Other commands: "


@entry
def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    word = given[0] if given and not given[0].startswith("-") else None
    if word is None:
        from dit_bench.command import run
        from dit_bench.options import build_parser

        parser = build_parser(ABOUT + ", ".join(f"dit-bench {name}" for name in COMMANDS))
        arguments = parser.parse_args(given)
        arguments.given = given
        return run_command(lambda: run(arguments))
    if word not in COMMANDS:
        known = ", ".join(COMMANDS)
        say(f"error: command {word!r} is unknown; choose one of {known}, or give --model",
              file=sys.stderr)  # fmt: skip
        return 2
    return run_command(partial(_command, word, given))


def _command(word: str, given: list[str]) -> int:
    name, about = COMMANDS[word]
    module = import_module(name)
    parser = Parser(f"dit-bench {word}", about)
    module.add_arguments(parser)
    run: Callable[[argparse.Namespace], int] = module.run
    arguments = parser.parse_args(given[1:])
    arguments.given = given
    return run(arguments)
