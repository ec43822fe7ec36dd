"""``dit-bench``: what this machine has; the measurements are modules of their own.

``python -m dit_bench.cpu``, ``.gpu``, ``.operators`` and ``.quality`` measure.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from dit_bench.hardware import describe_hardware
from dit_engine.cli.arguments import Parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("dit-bench", "Say what this machine has to run Diffusion Transformers on.")
    parser.add_argument("--env", action="store_true", help="hardware, versions, implementations")
    parser.add_argument("--json", action="store_true", help="as JSON")
    arguments = parser.parse_args(argv)
    if not arguments.env:
        parser.error("nothing to do: --env is the one thing that this command does so far")
    found = environment()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for part, values in found.items():
        print(part)
        for name, value in values.items():
            print(f"  {name:<15} {value}")
    return 0


def environment() -> dict[str, dict[str, object]]:
    """The hardware, and what of `dit_kernels` and of the backends it can run."""
    from torch import device

    from dit_kernels import available
    from dit_kernels.quantized import quantized_why_not

    gpu = describe_hardware().get("gpu")
    products = {
        kind: quantized_why_not(kind, device("cuda" if gpu and kind == "fp8" else "cpu")) or "yes"
        for kind in ("int8", "fp8")
    }
    return {
        "hardware": describe_hardware(),
        "kernels": dict(available()),
        "quantised products": dict(products),
    }


if __name__ == "__main__":
    sys.exit(main())
