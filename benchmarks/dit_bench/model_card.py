"""Writes measured figures into documents, so that none is ever typed.

``python -m dit_bench.model_card results.json README.md …`` replaces what stands between
``<!-- quality -->`` and ``<!-- /quality -->`` in each file by the table of the results.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_engine.cli.arguments import Parser
from dit_engine.cli.errors import run_command
from dit_engine.files import atomic_path

_BLOCK = re.compile(r"(<!-- quality -->\n).*?(<!-- /quality -->)", re.DOTALL)
_NAMES = {
    "generated": "generated images",
    "vae_reconstruction": "held-out images through the VAE (the best a DiT could do)",
    "floor": "held-out images, the other half (the floor of this N)",
}


def quality_table(report: dict[str, Any]) -> str:
    """Markdown of a `dit_bench.quality` report: distances with their N, recognition, settings."""
    settings, hardware = report["settings"], report["hardware"]
    lines = [f"| {report['metric']} to held-out images | N | distance |", "|---|---|---|"]
    for key, name in _NAMES.items():
        d = report["distances"][key]
        lines.append(f"| {name} | {d['n']} against {d['n_reference']} | {d['value']:.1f} |")
    made, real = (report["recognised"][key] for key in ("generated", "held_out"))
    speed = made["n"] / report["seconds"]["generated"]
    interval = settings["guidance_interval"]
    between = f" for σ in {interval[0]:g} to {interval[1]:g}" if interval else ""
    summary = (
        f"{made['fraction']:.1%} of the generated images lie nearest to their own class's mean "
        f"feature, {real['fraction']:.1%} of the held-out ones do. {settings['sampler']}, "
        f"{settings['steps']} steps, guidance {settings['guidance_scale']:g}{between} on "
        f"{settings['guidance_channels'] or 'all'} channels, {settings['precision']}, backend "
        f"{settings['backend']}; {speed:.1f} images a second, features included, on "
        f"{hardware['cpu']} with {hardware['torch_threads']} threads."
    )
    lines += ["", summary]
    return "\n".join(lines) + "\n"


def update_document(text: str, table: str) -> str:
    """``text`` with ``table`` in its quality block. Raises ValueError where there is none."""
    if not _BLOCK.search(text):
        raise ValueError("no '<!-- quality -->' … '<!-- /quality -->' block")
    return _BLOCK.sub(lambda match: match[1] + table + match[2], text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m dit_bench.model_card", description="Write figures into files.")
    parser.add_argument("results", type=Path, help="JSON of python -m dit_bench.quality")
    parser.add_argument("documents", type=Path, nargs="+")
    arguments = parser.parse_args(argv)

    def command() -> int:
        table = quality_table(json.loads(arguments.results.read_text(encoding="utf-8")))
        for path in arguments.documents:
            try:
                text = update_document(path.read_text(encoding="utf-8"), table)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            with atomic_path(path) as partial:
                partial.write_text(text, encoding="utf-8")
        return 0

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
