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
from dit_bench.show.reports import interrupted, report_tables
from dit_bench.show.speed_tables import ratio_grid, times_grid
from dit_engine.io.files import atomic_path
from dit_engine.io.printable import markdown_text


def report_markdown(report: Report) -> str:
    """The tables of a report, and what they were measured with. All of its text is escaped."""
    machine, settings = report["machine"], report["settings"]
    where = machine["gpu"] if machine["device"].startswith("cuda") else machine["cpu"]
    used = [text for key, setting in settings.items() if (text := _setting(key, setting))]
    contenders = " ".join(row["contender"] for row in report["rows"])
    known = [f"{name} {version}" for name, version in machine["versions"].items()
             if version and (name in ("torch", "diffusers") or name in contenders)]  # fmt: skip
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    note = f"Measured on {where}, {threads}, with {', '.join(known)}"
    notes = [f"{note}: {', '.join(used)}." if used else f"{note}."]
    if (busy := warning(report)) is not None:
        notes.append(f"{busy} Measure again before relying on them.")
    work = [row for row in report["rows"] if row["section"] in WORK]
    others = [row for row in report["rows"] if row["section"] not in WORK]
    rest = report | {"rows": others, "models": [], "ratios": [], "complete": True}
    _, *tables = report_tables(rest)  # the first one describes the machine
    if report.get("ratios"):  # they are of the times
        tables.insert(0, ratio_grid(report["ratios"]))
    elif work:
        tables.insert(0, times_grid(work))
    notes += interrupted(report)
    if not tables:
        raise ValueError("the report has no measurement: nothing to show")
    return "\n".join([*(table.markdown() for table in tables), *map(markdown_text, notes), ""])


def _setting(key: str, setting: object) -> str:
    """A setting as text; empty for hashes and for what is no number or word: the JSON has all."""
    if isinstance(setting, float):
        text = f"{setting:g}"
    elif isinstance(setting, list) and all(isinstance(one, float) for one in setting):
        text = "–".join(f"{one:g}" for one in setting)
    else:
        text = str(setting) if isinstance(setting, str | int) else ""
    return f"{key.replace('_', ' ')} {text}" if 0 < len(text) < 64 else ""


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
