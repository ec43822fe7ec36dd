"""``dit-bench documents``: writes measured figures into documents, so that none is typed by hand.

``dit-bench documents results.json README.md …`` replaces, in each document, what stands between
``<!-- NAME -->`` and ``<!-- /NAME -->`` by the tables of the report. NAME is the kind of the
report, such as "cpu" or "quality", unless ``--block`` gives another. ``--block speed`` writes the
absolute times of a CPU report, ``--block bounds --operators …`` the lowest possible ratios, and
``--block predictions`` what a step should cost on Hopper beside the profile of a GPU report ("none"
in place of the file for no measurement).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import wrap

from dit_bench.cost import dit_cost
from dit_bench.load import warning
from dit_bench.machine import same_processor
from dit_bench.prediction import ROWS, sources, table
from dit_bench.report import WORK, Report, read
from dit_bench.show.reports import interrupted, report_tables
from dit_bench.show.speed_tables import ratio_grid, times_grid
from dit_engine.config import ModelConfig
from dit_engine.io.files import atomic_path
from dit_engine.io.printable import markdown_text

COLUMNS = {
    "lean int8": "lean int8", "lean bf16": "lean bf16", "openvino bf16": "OpenVINO bf16",
    "diffusers bf16": "diffusers bf16", "diffusers fp32": "diffusers as it comes (fp32)",
}  # fmt: skip


def report_markdown(report: Report) -> str:
    """The tables of a report, the machine and the settings. All of the report's text is escaped."""
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
    if report["kind"] == "gpu":
        tables = report_tables(report | {"complete": True})
    elif report.get("ratios"):  # they are of the times
        tables.insert(0, ratio_grid(report["ratios"]))
    elif work:
        tables.insert(0, times_grid(work))
    notes += interrupted(report)
    if not tables:
        raise ValueError("the report has no measurement: nothing to show")
    return "\n".join([*(table.markdown() for table in tables), *map(markdown_text, notes), ""])


def _setting(key: str, setting: object) -> str:
    """A setting as text; empty for hashes and all but numbers and words, which the JSON has."""
    if isinstance(setting, list) and all(isinstance(one, float) for one in setting):
        text = "–".join(f"{one:g}" for one in setting)
    elif isinstance(setting, float):
        text = f"{setting:g}"
    else:
        text = str(setting) if isinstance(setting, str | int) else ""
    return f"{key.replace('_', ' ')} {text}" if 0 < len(text) < 64 else ""


def speed_table(report: Report) -> str:
    """Milliseconds of one step with guidance, which is a forward with two rows per image."""
    cases: dict[str, dict[str, float]] = {}
    for row in report["rows"]:
        if row["section"] == "forward" and row["status"] == "ok":
            images, builtin = row["images"] // 2, row["model"] == "builtin"
            name = "built-in model at 64 px" if builtin else f"DiT-{row['model']} at 256 px"
            case = f"{name}, {images} image{'s' * (images > 1)}"
            cases.setdefault(case, {})[row["contender"]] = row["ms"]["median"]
    if not cases:
        raise ValueError("no forward was timed")
    rows = [[case, *(f"{found[name]:.4g}" if name in found else "–" for name in COLUMNS)]
            for case, found in cases.items()]  # fmt: skip
    machine = report["machine"]
    versions = machine["versions"]
    known = [f"{name} {versions[name]}" for name in ("torch", "diffusers", "openvino")
             if versions.get(name)]  # fmt: skip
    note = (
        f"On {machine['cpu']} with {machine['threads']} threads: medians of interleaved rounds; "
        f"every result was checked before it was timed. {', '.join(known)}."
    )
    return _block(["ms for one step with guidance", *COLUMNS.values()], rows, note)


def bounds_table(cpu: Report, operators: Report) -> str:
    """The least ratio to each peer that XL/2's matrix products allow on this machine, at the best
    rate that any product of the same precision reached, if everything else took no time."""
    one, other = cpu["machine"], operators["machine"]
    if not (one["threads"] == other["threads"] and same_processor(one["cpu"], other["cpu"])):
        machines = [f"{m['cpu']} with {m['threads']} threads" for m in (one, other)]
        raise ValueError(f"the reports are of two machines: {machines[0]} and {machines[1]}")
    ratios = [row for row in cpu.get("ratios", ()) if row["case"] == "XL/2, batch 2"]
    if not ratios:
        raise ValueError("the report has no ratios of XL/2, batch 2")
    parts = dit_cost(ModelConfig.named("XL/2"))
    gflop = 4 * (parts["attention_linear"].macs + parts["mlp"].macs) / 1e9  # of two rows
    rates = {
        precision: max(row["rate"] for row in operators["rows"] if "rate" in row
                       and (row["operator"], row["dtype"]) == (operator, "bf16"))
        for precision, operator in (("bf16", "linear"), ("int8", "linear_int8"))
    }  # fmt: skip
    least = {precision: gflop / rate for precision, rate in rates.items()}  # ms: GFLOP / TFLOP/s
    rows = [
        [f"{row['ours']} ÷ {row['theirs']}", f"{row['goal']:.2f}", f"{row['ratio']['median']:.2f}",
         f"{least[row['ours'].removeprefix('lean ')] / row['theirs_ms']:.2f}"]
        for row in ratios
        if row["goal"] and "reason" not in row and row["theirs"] != "linears alone"
    ]  # fmt: skip
    note = (
        f"The linear layers of the blocks are {gflop:.0f} GFLOP in one forward of XL/2 with 2 "
        f"rows. At the best rate of any product measured on this processor, {rates['bf16']:.3f} "
        f"TFLOP/s in bf16 and {rates['int8']:.3f} in int8, they take {least['bf16']:.0f} and "
        f"{least['int8']:.0f} ms however the rest is done."
    )
    return _block(["ratio", "goal, for AMX", "reached", "least possible here"], rows, note)


def prediction_tables(report: Report | None) -> str:
    """A step of XL/2, kernel by kernel, with 64 and with 2 rows."""
    blocks = [_block(*table(rows, report)) for rows in ROWS]
    return "\n".join([*blocks, *_wrapped(sources()), ""])


def _block(columns: Sequence[str], rows: Iterable[Sequence[str]], note: str) -> str:
    lines = [f"| {' | '.join(map(markdown_text, row))} |" for row in (columns, *rows)]
    lines.insert(1, "|---" * len(columns) + "|")
    return "\n".join([*lines, "", *_wrapped(note), ""])


def _wrapped(text: str) -> list[str]:
    return wrap(markdown_text(text), 100, break_on_hyphens=False)


def update_document(text: str, block: str, table: str) -> str:
    """``text`` with ``table`` in its ``block``. Raises ValueError if it has no such block."""
    begin, end = f"<!-- {block} -->\n", f"<!-- /{block} -->"
    pattern = re.compile(f"(?<={re.escape(begin)}).*?(?={re.escape(end)})", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no '<!-- {block} -->' … '{end}' block")
    return pattern.sub(lambda _: table, text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `run` reads."""
    parser.add_argument(
        "results", type=Path, help="JSON of a dit-bench command; for predictions also none"
    )
    parser.add_argument("documents", type=Path, nargs="+")
    parser.add_argument("--block", help="name of the block; the kind of the report unless given")
    parser.add_argument("--operators", type=Path, help="report of the operators, for bounds")


def run(arguments: argparse.Namespace) -> int:
    block = arguments.block
    if block == "predictions":
        blank = str(arguments.results) == "none"
        made = prediction_tables(None if blank else read(arguments.results, "gpu"))
    else:
        report = read(arguments.results)
        block = block or report["kind"]
        if arguments.operators is not None:
            made = bounds_table(report, read(arguments.operators, "operators"))
        else:
            made = (speed_table if block == "speed" else report_markdown)(report)
    for path in arguments.documents:
        try:
            text = update_document(path.read_text(encoding="utf-8"), block, made)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        with atomic_path(path) as partial:
            partial.write_text(text, encoding="utf-8")
    return 0
