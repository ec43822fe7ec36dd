"""``dit-export``: graphs, engines and server repositories from a model."""

from __future__ import annotations

if __name__ == "__main__":  # before anything else is imported
    from dit_engine.first import leave_out_of_path

    leave_out_of_path()

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from dit_engine._version import __version__
from dit_engine.arguments import choice
from dit_engine.console.parser import Parser
from dit_engine.console.run import entry, output_is_a_file, run_command

# name → (module with add_arguments and run, one line of help); only the one asked for is imported.
_COMMANDS = {
    "onnx": ("dit_export.cli_onnx", "ONNX graphs of the transformer, a sampler step and the VAE"),
    "tensorrt": ("dit_export.cli_tensorrt", "TensorRT engines from an ONNX export"),
    "triton": ("dit_export.server.command", "a model repository for Triton Inference Server"),
}


@entry
def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print("usage: dit-export COMMAND [options]; dit-export COMMAND --help lists them\n")
        for known, (_, line) in _COMMANDS.items():
            print(f"  {known:10s} {line}")
        raise SystemExit(0)
    if name == "--version":
        print(f"dit-export {__version__}")
        raise SystemExit(0)

    def command() -> int:
        module_name, line = _COMMANDS[choice("command", name, _COMMANDS)]
        module = import_module(module_name)
        parser = Parser(f"dit-export {name}", f"{line[0].upper()}{line[1:]}.")
        module.add_arguments(parser)
        parsed = parser.parse_args(arguments[1:])
        output_is_a_file()
        parsed.given = options_given(parser, arguments[1:])
        return module.run(parsed)

    return run_command(command)


def options_given(parser: argparse.ArgumentParser, words: list[str]) -> dict[str, str]:
    """The options that ``words`` give: attribute of the namespace → option ("queue_delay" →
    "--queue-delay"), also those that repeat the default.

    Afterwards the parser has no defaults.
    """
    options = {}
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        options[action.dest] = max(action.option_strings, key=len, default=action.dest)
    return {name: options[name] for name in vars(parser.parse_args(words))}


if __name__ == "__main__":
    sys.exit(main())
