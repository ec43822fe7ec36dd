"""Writes measured figures into documents, so that none is ever typed.

``python -m dit_bench.show.markdown results.json README.md …`` replaces what stands between
``<!-- quality -->`` and ``<!-- /quality -->`` in each file by the table of a
`dit_bench.quality.fd_lite0`
report; so with ``cpu`` (``profile`` with its ``--profile``), ``gpu``, ``operators``, ``parity`` and
``scaling`` of those modules' reports, ``paper-models`` of one of ``dit-bench --peers unet``, and
``bounds`` of one of `dit_bench.cpu` with ``--operators`` beside it.
"""

from __future__ import annotations

from typing import Any

from dit_bench.escaped import of_escaped
from dit_bench.gpu_markdown import gpu_table
from dit_bench.load import not_quoted
from dit_bench.result_tables import (
    bounds_table,
    operators_table,
    paper_models_table,
    profile_table,
)


def _threads(hardware: dict[str, Any]) -> str:
    count = hardware["torch_threads"]
    return f"{count} thread{'' if count == 1 else 's'}"


# Columns of `cpu_table`: what is divided by what, the latter by the beginning of its name.
_CPU_COLUMNS = (
    ("lean bf16", "diffusers bf16"),
    ("lean bf16", "openvino bf16"),
    ("lean bf16", "compile bf16"),
    ("lean bf16", "diffusers fp32"),
    ("lean int8", "diffusers bf16"),
    ("lean bf16", "linears alone"),
)


@of_escaped
def cpu_table(report: dict[str, Any]) -> str:
    """Markdown of a `dit_bench.cpu` report: a line a workload, a column a ratio, and the goals."""
    first = [_row_of(report["sections"][0], *column) for column in _CPU_COLUMNS]
    names = [
        f"{ours} ÷ {row['theirs'] if row else theirs}"
        for (ours, theirs), row in zip(_CPU_COLUMNS, first, strict=True)
    ]
    lines = [
        "| one forward | lean bf16, ms | " + " | ".join(names) + " |",
        "|---" * (2 + len(names)) + "|",
    ]
    goals: list[str] = []
    notes: list[str] = []
    for section in report["sections"]:
        found = [_row_of(section, *column) for column in _CPU_COLUMNS]
        if all(found[:1]) and found[-1]:  # a forward: the decoder has no linears
            cells = [f"{row['ratio']['median']:.2f}" if row else "–" for row in found]
            lines.append(
                f"| {section['workload']} | {found[0]['ours_ms']:.4g} | {' | '.join(cells)} |"
            )
            if not goals and any(row and row["bar"] for row in found):
                goals = [f"{row['bar']:.2f}" if row and row["bar"] else "–" for row in found]
                last = found[-1]
                notes.append(
                    f"The linear layers alone, their weights cold, take {last['theirs_ms']:.4g} of "
                    f"{section['workload'].split(',')[0]}'s {last['ours_ms']:.4g} ms: what fusion "
                    "could still win is the rest."
                )
            continue
        for row in section.get("rows", []):
            if "skipped" in row:
                continue
            ratio = row["memory"]["ratio"] if "memory" in row else row["ratio"]["median"]
            name = (
                "peak memory in a step ÷ (weights + activations)"
                if "memory" in row
                else f"{row['ours']} ÷ {row['theirs']}"
            )
            workload = section["workload"].removesuffix(": memory")
            loading = (
                f"; {row['memory']['peak_while_loading']['total'] / 2**20:.0f} MiB while loading, "
                f"{row['memory']['peak_while_running']['total'] / 2**20:.0f} after"
                if "memory" in row
                else ""
            )
            notes.append(f"{workload}: {name} {ratio:.2f}{_goal(row)}{loading}.")
    if goals:
        lines.append(f"| *at most, the goal with AMX* | | {' | '.join(goals)} |")
    hardware, versions = report["hardware"], report["versions"]
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    notes.append(
        f"{hardware['cpu']}, {_threads(hardware)}, with "
        f"{', '.join(report['instruction_sets'])}; {known}. Medians of interleaved rounds; the "
        "same weights and inputs, results compared before timing."
    )
    if (busy := not_quoted(report)) is not None:
        notes.append(
            f"The machine was {busy}, which is no idle machine's: measure again before relying on "
            "these figures."
        )
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def _row_of(section: dict[str, Any], ours: str, theirs: str) -> Any:
    for row in section.get("rows", []):
        if row.get("ours") == ours and str(row.get("theirs")).startswith(theirs):
            return None if "skipped" in row else row
    return None


def _goal(row: dict[str, Any]) -> str:
    return "" if row["bar"] is None else f" (goal: {row['bar']:.2f})"


def block_and_table(
    report: dict[str, Any], operators: dict[str, Any] | None = None
) -> tuple[str, str]:
    """A report's block, told by a key that the others do not have, and its table."""
    if operators is not None:
        return "bounds", bounds_table(report, operators)
    for key, block, table in (
        ("gpu_state", "gpu", gpu_table),
        ("operators", "operators", operators_table),
        ("measurements", "paper-models", paper_models_table),
    ):
        if key in report:
            return block, table(report)
    if "profile" in report["sections"][0]:
        return "profile", profile_table(report)
    return "cpu", cpu_table(report)
