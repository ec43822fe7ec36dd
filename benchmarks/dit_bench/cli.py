"""``dit-bench``: cost, latency and peers of a Diffusion Transformer on this machine.

``dit-bench gflops`` prints the paper's table beside ours, ``dit-bench fid`` measures distances
between sets of images; without one of these words models are measured.
"""

from __future__ import annotations

if __name__ == "__main__":  # before anything else is imported
    from dit_engine.first import leave_out_of_path

    leave_out_of_path()

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from dit_engine.console.parser import Parser
from dit_engine.console.run import entry, run_command
from dit_engine.io.printable import say

# word → (module with add_arguments(parser) and run(arguments), what it does)
COMMANDS = {
    "gflops": ("dit_bench.gflops", "The paper's table of twelve models beside ours."),
    "fid": ("dit_bench.quality.fid", "FID and other distances between sets of images."),
    "parity": ("dit_bench.quality.parity", "Backends against eager float32, noise equal."),
    "quality": ("dit_bench.quality.fd_lite0", "FD-Lite0 of a model against held-out avatars."),
    "documents": ("dit_bench.show.markdown", "Write the tables of reports into documents."),
}
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
        return run_command(lambda: run(arguments, given))
    if word not in COMMANDS:
        known = ", ".join(COMMANDS)
        say(f"error: command {word!r} is unknown; choose one of {known}, or give --model",
              file=sys.stderr)  # fmt: skip
        return 2
    module_name, about = COMMANDS[word]
    return run_command(lambda: _command(word, module_name, about, given[1:]))


def _command(word: str, module_name: str, about: str, given: list[str]) -> int:
    module = import_module(module_name)
    parser = Parser(f"dit-bench {word}", about)
    module.add_arguments(parser)
    run: Callable[[argparse.Namespace], int] = module.run
    return run(parser.parse_args(given))


if __name__ == "__main__":
    sys.exit(main())
