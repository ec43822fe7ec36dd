"""``dit-bench documents``: writes measured figures into documents, so that none is typed by hand.

``dit-bench documents results.json README.md …`` replaces, in each document, what stands between
``<!-- NAME -->`` and ``<!-- /NAME -->`` by the tables of the report. NAME is the kind of the
report, such as "cpu" or "quality", unless ``--block`` gives another. ``--block speed`` writes the
absolute times of a CPU report, ``--block bounds --operators …`` what bounds its ratios.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from dit_bench.load import warning
from dit_bench.report import WORK, Report, read
from dit_bench.show.blocks import bounds_table, speed_table
from dit_bench.show.reports import report_tables
from dit_engine.io.files import atomic_path
from dit_engine.io.printable import markdown_text


def report_markdown(report: Report) -> str:
    """The tables of a report, and what they were measured with. All of its text is escaped."""
    machine, settings = report["machine"], report["settings"]
    where = machine["gpu"] if machine["device"].startswith("cuda") else machine["cpu"]
    # Without hashes and what is no single value; the JSON has everything.
    used = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items()
            if isinstance(v, str | int | float) and len(str(v)) < 64]  # fmt: skip
    known = [f"{name} {version}" for name, version in machine["versions"].items() if version]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    note = f"Measured on {where}, {threads}, with {', '.join(known)}"
    notes = [f"{note}: {', '.join(used)}." if used else f"{note}."]
    if (busy := warning(report)) is not None:
        notes.append(f"{busy} Measure again before relying on them.")
    if report.get("ratios"):  # they are of the times, which stay in the JSON
        report = report | {"rows": [r for r in report["rows"] if r["section"] not in WORK]}
    _, *tables = report_tables(report | {"models": []})  # the first one describes the machine
    if not tables:
        raise ValueError("the report has no measurement: nothing to show")
    return "\n".join([*(table.markdown() for table in tables), *map(markdown_text, notes), ""])


def update_document(text: str, block: str, table: str) -> str:
    """``text`` with ``table`` in its ``block``. Raises ValueError if it has no such block."""
    pattern = re.compile(
        f"(<!-- {re.escape(block)} -->\n).*?(<!-- /{re.escape(block)} -->)", re.DOTALL
    )
    if not pattern.search(text):
        raise ValueError(f"no '<!-- {block} -->' … '<!-- /{block} -->' block")
    return pattern.sub(lambda match: match[1] + table + match[2], text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `run` reads."""
    parser.add_argument("results", type=Path, help="JSON of a dit-bench command")
    parser.add_argument("documents", type=Path, nargs="+")
    parser.add_argument("--block", help="name of the block; the kind of the report unless given")
    parser.add_argument("--operators", type=Path, help="report of the operators, for bounds")


def run(arguments: argparse.Namespace) -> int:
    report = read(arguments.results)
    if arguments.operators is not None:
        table = bounds_table(report, read(arguments.operators, "operators"))
    else:
        table = (speed_table if arguments.block == "speed" else report_markdown)(report)
    for path in arguments.documents:
        try:
            text = path.read_text(encoding="utf-8")
            text = update_document(text, arguments.block or report["kind"], table)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        with atomic_path(path) as partial:
            partial.write_text(text, encoding="utf-8")
    return 0
