"""``dit-bench``: cost, latency and peers of a Diffusion Transformer on this machine.

If the first word is none of `COMMANDS`, models are measured: ``dit-bench --model XL/2 …``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
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
    "documents": ("dit_bench.show.documents", "Write the tables of reports into documents."),
    "fid": ("dit_bench.quality.fid", "FID and its kin of two sets of images."),
}
"""Word → (module with add_arguments(parser) and run(arguments), what it does)."""
MODELS = (
    "dit_bench.models_command",
    "Measure a Diffusion Transformer: cost, latency, peers. Other commands: "
    + ", ".join(f"dit-bench {word}" for word in COMMANDS),
)


@entry
def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    word = given[0] if given and not given[0].startswith("-") else ""
    if word and word not in COMMANDS:
        known = ", ".join(COMMANDS)
        say(f"error: command {word!r} is unknown; choose one of {known}, or give --model",
              file=sys.stderr)  # fmt: skip
        return 2
    return run_command(partial(_command, word, given))


def _command(word: str, given: list[str]) -> int:
    name, about = COMMANDS.get(word, MODELS)
    module = import_module(name)
    parser = Parser(f"dit-bench {word}".strip(), about)
    module.add_arguments(parser)
    arguments = parser.parse_args(given[bool(word) :])
    arguments.given = given
    return module.run(arguments)
