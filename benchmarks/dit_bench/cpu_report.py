"""Rows of the CPU's speed table: which ratio, its bar, what was measured; as text and as JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dit_bench.cpu_forward import STEPS
from dit_bench.hardware import describe_hardware
from dit_bench.peers import Built
from dit_bench.timing import Interleaved

PACKAGES = ("torch", "diffusers", "openvino", "numpy")
INSTRUCTIONS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile",
    "amx_bf16", "amx_int8",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """ours ÷ theirs, with the bar that the ratio must not exceed (None: for information).

    ``theirs`` may begin several names ("compile bf16"): the quickest of these is meant.
    """

    ours: str
    theirs: str
    bar: float | None = None


FORWARD = (
    ("lean bf16", "diffusers bf16"),
    ("lean bf16", "openvino bf16"),
    ("lean bf16", "compile bf16"),
    ("lean int8", "diffusers bf16"),
    ("lean bf16", "diffusers fp32"),
    ("lean bf16", "linears alone"),
)
# DiT-XL/2 at 256 px and batch 2, in the order of FORWARD.
FORWARD_BARS = (0.50, 0.66, 0.53, 0.33, 0.13, 1.25)
DECODE = (
    Comparison("lean bf16", "openvino bf16", 0.85),
    Comparison("lean bf16", "diffusers bf16"),
)
MEMORY_BAR = 1.15


def forward_comparisons(with_bars: bool) -> tuple[Comparison, ...]:
    bars = FORWARD_BARS if with_bars else (None,) * len(FORWARD)
    return tuple(Comparison(*pair, bar) for pair, bar in zip(FORWARD, bars, strict=True))


def verdict(value: float | None, bar: float | None) -> str:
    """ "pass" at or under the bar, "miss" above it, "" without a bar, "skipped" without a value."""
    if value is None:
        return "skipped"
    if bar is None:
        return ""
    return "pass" if value <= bar else "miss"


def make_row(
    workload: str, comparison: Comparison, built: Built, times: Interleaved
) -> dict[str, Any]:
    """One row as JSON: ratio (10 %, 50 % and 90 % quantiles over rounds), both medians in ms.

    "conditioned" is the ratio with the hoisted conditioning spread over ``STEPS`` steps and added
    to ours: peers compute theirs within each forward, except OpenVINO's, which has none there.
    """
    row: dict[str, Any] = {
        "workload": workload,
        "ours": comparison.ours,
        "theirs": comparison.theirs,
        "bar": comparison.bar,
    }
    for name in (comparison.ours, comparison.theirs):
        reasons = _reasons(name, built)
        if reasons is not None:
            return row | {"skipped": f"{name}: {reasons}", "result": verdict(None, comparison.bar)}
    theirs = min(_candidates(comparison.theirs, built), key=lambda name: times.ms(name).median)
    ratio = times.ratio(comparison.ours, theirs)
    row |= {
        "theirs": theirs,
        "ratio": {"low": ratio.low, "median": ratio.median, "high": ratio.high},
        "ours_ms": times.ms(comparison.ours).median,
        "theirs_ms": times.ms(theirs).median,
        "result": verdict(ratio.median, comparison.bar),
    }
    hoisted = hoisted_ms(comparison.ours, times)
    whole = built.records[theirs].get("error") is not None and not theirs.startswith("openvino")
    if hoisted is not None and whole:
        row["conditioned"] = ratio.median * (1 + hoisted / STEPS / row["ours_ms"])
    return row


def hoisted_ms(name: str, times: Interleaved) -> float | None:
    """What ``name`` computes once before its ``STEPS`` steps: its start less an ordinary step.

    None where there was no such measurement. A difference of two medians, at least 0.
    """
    start = f"{name} start"
    if start not in times.samples_ms or name not in times.samples_ms:
        return None
    return max(0.0, times.ms(start).median - times.ms(name).median)


def _candidates(name: str, built: Built) -> list[str]:
    return [key for key in built.functions if key == name or key.startswith(f"{name} ")]


def _reasons(name: str, built: Built) -> str | None:
    """Why no peer of this name was timed, or None if one was."""
    if any(not key.endswith(" start") for key in _candidates(name, built)):
        return None
    asked = [key for key in built.records if key == name or key.startswith(f"{name} ")]
    asked = [key for key in asked if not key.endswith(" start")]
    return "; ".join(str(built.reason(key)) for key in asked) or "not asked for"


def memory_row(workload: str, measured: Mapping[str, Any] | str, with_bar: bool) -> dict[str, Any]:
    """The row of `cpu_memory.measure`'s result, or of the reason why there is none."""
    bar = MEMORY_BAR if with_bar else None
    row: dict[str, Any] = {"workload": workload, "bar": bar}
    if isinstance(measured, str):
        return row | {"skipped": measured, "result": verdict(None, bar)}
    return row | {"memory": dict(measured), "result": verdict(measured["ratio"], bar)}


WIDTH = 112
"""Columns of `format_table`, unless short."""


def format_table(rows: Sequence[Mapping[str, Any]], short: bool = False) -> str:
    """The rows as text, one line each, under a head; short: median, bar and verdict alone."""
    head = (
        f"{'':<42} {'at most':>7} {'median':>7} {'10-90 %':>13} {'+cond.':>7} "
        f"{'ours ms':>9} {'theirs ms':>9}"
    )
    lines = []
    workload = None
    for row in rows:
        if row["workload"] != workload:
            workload = row["workload"]
            lines += ["", f"{workload}"] if short else ["", f"{workload}", head]
        if short:
            lines.append(_short_line(row))
            continue
        lines.append(_memory_line(row) if "ours" not in row else _line(row))
    return "\n".join(line.rstrip() for line in lines)


def _short_line(row: Mapping[str, Any]) -> str:
    name = f"{row['ours']} ÷ {row['theirs']}" if "ours" in row else "peak ÷ weights + activations"
    if "skipped" in row:
        return f"  {name}: skipped: {row['skipped']}"
    ratio = row["memory"]["ratio"] if "memory" in row else row["ratio"]["median"]
    bar = "" if row["bar"] is None else f", at most {row['bar']:.2f}: {row['result']}"
    return f"  {name}: {ratio:.3f}{bar}"


def _line(row: Mapping[str, Any]) -> str:
    name = f"  {row['ours']} ÷ {row['theirs']}"
    bar = "" if row["bar"] is None else f"{row['bar']:.2f}"
    if "skipped" in row:
        return f"{name:<42} {bar:>7} skipped: {row['skipped']}"
    ratio = row["ratio"]
    between = f"{ratio['low']:.3f}-{ratio['high']:.3f}"
    conditioned = f"{row['conditioned']:.3f}" if "conditioned" in row else ""
    return (
        f"{name:<42} {bar:>7} {ratio['median']:>7.3f} {between:>13} {conditioned:>7} "
        f"{row['ours_ms']:>9.2f} {row['theirs_ms']:>9.2f}  {row['result']}"
    )


def _memory_line(row: Mapping[str, Any]) -> str:
    name, bar = "  peak ÷ weights + activations", "" if row["bar"] is None else f"{row['bar']:.2f}"
    if "skipped" in row:
        return f"{name:<42} {bar:>7} skipped: {row['skipped']}"
    memory = row["memory"]
    mib = {key: memory[key]["total"] / 2**20 for key in
           ("peak_while_loading", "after_load", "peak_while_running")}  # fmt: skip
    needed = sum(memory["needed"].values()) / 2**20
    return (
        f"{name:<42} {bar:>7} {memory['ratio']:>7.3f}   resident MiB: {mib['after_load']:.0f} "
        f"after load, {mib['peak_while_running']:.0f} at most in a step, "
        f"{memory['peak_while_running']['anonymous'] / 2**20:.0f} of it no mapped file "
        f"({mib['peak_while_loading']:.0f} while loading); needed {needed:.0f}  {row['result']}"
    )


def format_profile(section: Mapping[str, Any]) -> str:
    """A profile section as text: shares of the forward, then each operator alone."""
    profile = section["profile"]
    lines = ["", f"{section['workload']}: {profile['forward_ms']:.1f} ms a forward"]
    lines += [f"  {part['part']:<14} {part['ms']:>9.2f} ms {part['share']:>7.1%}"
              for part in profile["shares"]]  # fmt: skip
    lines.append("  of which, each alone in sequence:")
    lines += [f"    {part:<14} {ms:>9.2f} ms" for part, ms in profile["operators_ms"].items()]
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """Hardware, versions of the packages that were compared, and instruction sets."""
    return {
        "hardware": describe_hardware(),
        "versions": {package: _version(package) for package in PACKAGES},
        "instruction_sets": instruction_sets(),
        "implementations": _implementations(),
    }


def _version(package: str) -> str | None:
    if package == "torch":  # its metadata may leave the build's CUDA out
        return torch.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def instruction_sets(cpuinfo: str | None = None) -> list[str]:
    """Those of `INSTRUCTIONS` that the processor has; none where the system does not tell."""
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    match = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    flags = set(match[1].split()) if match else set()
    return [name for name in INSTRUCTIONS if name in flags]


def _implementations() -> dict[str, str]:
    try:
        from dit_kernels import available

        return available()
    except ImportError as error:
        return {"dit_kernels": str(error)}


def slug(processor: str) -> str:
    """A processor's name as part of a file name: "AMD EPYC 9B14" → "amd-epyc-9b14"."""
    plain = re.sub(r"\((r|tm)\)|@.*", "", processor.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "unknown"
