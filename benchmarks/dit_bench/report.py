"""The one report: what every measurement writes as JSON, and what tables, figures and pages show.

More than 300 lines, because the schema, its checks and its reading belong together.

A report is an object with the keys of `SCHEMA`. What was measured is its "rows", and every row has

- "section": what was done, one of `SECTIONS`, which also lists what rows of that section hold;
- "case": on what, for people, such as "XL/2, batch 2" or "attention N=2 T=256 H=16 d=72";
- "contender": who did it, such as "lean bf16", "openvino bf16" or, of an operator, "native";
- "role": "subject" is what the run is about, "peer" is what it is compared with, "other network"
  computes another function, and "part" is a part of the work that is timed by itself;
- "status": "ok"; "wrong" (its result is not right, so it was not timed); "skipped" (it cannot run
  here, or no time was left); "failed" (it broke); "late" (the run had to be ended). All but "ok"
  have a "reason".

A time is "ms": milliseconds of one call, as quantiles over rounds. "ratio" holds the quantiles of
the time over the subject's time in the same round. "error" is relative, against float32 eager
torch, and "bound" is what was allowed. "goal" is the largest allowed value of a figure, and
"result" says whether it was reached: "pass", "miss", "skipped", `NO_VERDICT`, or "" without a goal.

`read` takes files from others: it refuses what does not fit the schema. Text in a report may still
hold anything, so it is printed through `dit_engine.io.printable`, and escaped in Markdown and HTML.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_bench.outputs import finite, json_text, write_text
from dit_engine.console.output import STDOUT
from dit_engine.io.json_files import Schema, check_schema, read_json_value
from dit_engine.io.provenance import without_paths

VERSION = "dit-bench/3"
OLDER = ("dit-bench/1", "dit-bench/2")
KINDS = ("models", "cpu", "gpu", "operators", "parity", "quality", "fid", "gflops", "scaling")
"""Which command wrote the report; "models" is ``dit-bench --model …``."""
WORK = ("forward", "step", "decode", "image")
"""The sections of ``dit-bench --only``: a forward, a guided step, a decode, a whole generation."""
PARTS = ("patch_embed", "conditioning", "adaln", "attention", "mlp", "final")
"""The parts of a model whose cost is given."""
NO_VERDICT = "busy: no verdict"

Report = dict[str, Any]
Row = dict[str, Any]

_SPREAD = {"median": "positive", "p5?": "positive", "p95?": "positive", "n?": "count"}
_RATIO = {"p5": "number", "median": "number", "p95": "number"}

SCHEMA: Schema = {
    "": {
        "schema": "text",  # VERSION
        "kind": KINDS,
        "created": "text",  # ISO 8601, UTC
        "command": "text[]",  # the arguments
        "machine": "object",
        "settings": "object",  # of the run; what it holds depends on the kind
        "load_average?": "number?",  # of the last minute before the run
        "other_load?": "number?",  # processors that others kept busy while times were taken
        "ceilings?": "object?",  # what the machine reached at best in the same run
        "energy?": "text?",  # whose energy is measured, or why none is
        "models?": "list",  # what the models of the rows cost
        "rows": "list",
        "ratios?": "list",  # of kind "cpu": times of one contender over those of another
        "comparison?": "object",  # with an older report
        "complete": "bool",  # whether the run came to its end
        "failure?": "text",  # what ended it early
        "seconds?": "number",
    },
    "machine": {
        "cpu": "text", "gpu?": "text?", "device": "text", "threads": "count",
        "cpu_count?": "count?", "platform?": "text", "python?": "text",
        "instruction_sets": "text[]", "versions": "object", "kernels?": "object",
        "cuda?": "object?",  # of a CUDA device: driver, capability, clocks, power
    },
    "machine.versions": {"<text>": "text?"},  # package → version
    "ceilings": {
        "copy_gb_s": "positive", "matmul_tflop_s": "object", "missing": "object",
        "matmul_size": "count", "measured?": "text",
    },
    "ceilings.matmul_tflop_s": {"<text>": "positive"},  # "bf16" → 10^12 operations per second
    "ceilings.missing": {"<text>": "text"},  # "fp8" → why there is no figure
    "models[]": {
        "model": "text",  # "XL/2", or what was given
        "weights": "text",  # "random", or where they came from
        "size": "number?",  # pixels along a side
        "config": "object", "tokens": "number", "cost": "object", "decoder": "object?",
    },
    "models[].config": {"numerics": "text"},
    "models[].decoder": {"macs": "number"},
    "models[].cost": {"parts": "object", "total": "object"},
    "models[].cost.parts": dict.fromkeys(PARTS, "object"),
    **{f"models[].cost.parts.{part}": {"macs": "number"} for part in PARTS},
    # Of one image and one forward; flops = 2 · macs; counted_flops is torch's own count.
    "models[].cost.total": {
        "parameters": "number", "macs": "number", "flops": "number", "counted_flops": "number",
    },
    "rows[]": {
        "section": "text", "case": "text", "contender": "text",
        "role?": ("subject", "peer", "other network", "part"),
        "status": ("ok", "wrong", "skipped", "failed", "late"),
        "reason?": "text", "precision?": "text", "model?": "text", "images?": "number",
        "size?": "number?", "ms?": "object", "samples_ms?": "number[]", "noisy?": "bool",
        "ratio?": "object", "verdict?": "text", "error?": "number?", "bound?": "number?",
        "goal?": "number?", "result?": "text", "other_load?": "number?",
    },
    "rows[].ms": _SPREAD,
    "rows[].ratio": _RATIO,
    "ratios[]": {
        "case": "text", "ours": "text", "theirs": "text", "goal": "number?", "result": "text",
        "reason?": "text",  # why there is no ratio
        "ratio?": "object", "ours_ms?": "positive", "theirs_ms?": "positive",
        "conditioned?": "number",  # the ratio with what lean computes once before its steps
    },
    "ratios[].ratio": {**_RATIO, "p5": "number?", "p95": "number?"},
    "comparison": {"rows": "list", "notes": "text[]", "lost?": "text[]"},
    "comparison.rows[]": {
        "case": "text", "section": "text", "contender": "text", "old_ms": "number",
        "new_ms": "number", "ratio": "number", "verdict": "text",
    },
}  # fmt: skip

_TIMED = {"ms": "object", "precision": "text"}
_DONE = _TIMED | {
    "model": "text", "images": "count", "noisy": "bool", "images_s": "number",
    "setup_s?": "number", "first_call_s?": "number", "gflops?": "number", "tflop_s?": "number",
    "flops_per_byte?": "number", "percent_of_matmul?": "number", "percent_of_copy?": "number",
    "bound_by?": "text", "built_mib?": "number", "peak_mib?": "number",
    "joules_per_image?": "number", "conditioning_ms?": "number",
}  # fmt: skip

SECTIONS: Mapping[str, Schema] = {
    # Work of a model for "images" rows (forward) or images (all others).
    **{name: {"": _DONE} for name in WORK},
    # An operator of dit_kernels. "speedup_over": contender → how many times as quick as it.
    "operator": {
        "": {
            "operator": "text", "shape": "text", "dtype": "text", "ms?": "object",
            "rate?": "positive", "unit?": ("TFLOP/s", "GB/s"), "flops?": "number",
            "bytes?": "positive", "percent_of_ceiling?": "number?", "speedup_over?": "object",
            "error_over_reference?": "number?",
        },
        "speedup_over": {"<text>": "number"},
    },
    # Where a forward's time goes: "ms" is the forward's, "operators_ms" that of each alone.
    "profile": {
        "": _TIMED | {"shares": "list", "operators_ms": "object"},
        "shares[]": {"part": "text", "ms": "number", "share": "number"},
        "operators_ms": {"<text>": "number"},
    },
    # Beside "neighbours" busy programs; "ratio" is the busy time over the idle one.
    "busy": {
        "": {
            "neighbours": "count", "idle_ms": "positive", "busy_ms": "positive", "ratio": "object",
        },
    },
    # A check without a time.
    "check": {"": {}},
    # Resident bytes of a lean forward; "value" is the peak over what is needed.
    "memory": {
        "": {
            "value": "positive", "needed": "object", "after_load": "object",
            "peak_while_loading": "object", "peak_while_running": "object",
        },
        "needed": {"<text>": "count"},
        "after_load": {"total": "number", "anonymous": "number"},
        "peak_while_loading": {"total": "number", "anonymous": "number"},
        "peak_while_running": {"total": "number", "anonymous": "number"},
    },
    # A backend against eager float32 from the same noise, for "n" images. Errors that are not
    # finite are null. A null PSNR is infinite (of equal images) unless an image is not finite.
    "parity": {
        "": {
            "model": "text", "n": "count", "settings": "object",
            "latent_error_by_step": "number?[]", "final_latent_error": "object",
            "psnr_db?": "object", "sets?": "object?", "interrupted?": "bool",
        },
        "final_latent_error": {"mean": "number?", "max": "number?"},
        "psnr_db": {"median": "number?", "min": "number?", "not_finite": "number"},
        "sets": {"metric": "text", "n": "count", "between": "number", "reference?": "text"},
    },
    # Distances between sets of images.
    "distance": {
        "": {"metric": "text", "n": "count?", "n_reference?": "number?", "distance": "number"},
    },
    # The fraction of images that lie nearest to their own class, in all and by class.
    "recognised": {
        "": {"n": "count", "fraction": "number", "by_class": "object"},
        "by_class": {"<text>": "number"},
    },
    # What a network costs per image: one row per network and size.
    "cost": {
        "": {
            "model": "text", "size": "count", "published_gflops": "number?",
            "published_million_parameters": "number?", "parts": "object", "total": "object",
        },
        "total": {
            "parameters": "number", "trained_parameters": "number", "macs": "number",
            "flops": "number", "counted_flops": "number",
        },
    },
    # The paper's claims in miniature: a network after "steps" of training.
    "scaling": {
        "": {"gmacs": "positive", "steps": "count", "distance": "number", "n": "count"},
    },
}  # fmt: skip

# Additional values of paired sets that have a reference.
_WITH_REFERENCE = {
    "n_reference": "number?", "to_reference": "number", "eager_to_reference": "number",
    "absolute_difference": "object", "confidence": "number", "resamples": "number",
}  # fmt: skip
_INTERVAL = {"value": "number", "low": "number?", "high": "number?"}


def new_report(
    kind: str, machine: Mapping[str, Any], settings: Mapping[str, Any], command: Sequence[str] = ()
) -> Report:
    """A report with nothing measured yet. ``machine`` is `dit_bench.machine.describe`'s."""
    return {
        "schema": VERSION, "kind": kind,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": list(command), "machine": dict(machine), "settings": dict(settings),
        "rows": [], "complete": False,
    }  # fmt: skip


def read(path: Path, *kinds: str) -> Report:
    """The report in a JSON file, of one of ``kinds`` where some are given.

    Raises ValueError, which names the file, for everything else, and OSError.
    """
    try:
        report = read_json_value(path, pipe=True)
        validate(report)
        if kinds and report["kind"] not in kinds:
            raise ValueError(f"kind {report['kind']!r} is not one of {', '.join(kinds)}")
    except ValueError as error:
        raise ValueError(f"{path} is not a report of dit-bench: {error}") from None
    return report


def validate(report: Any) -> None:
    """Raise a one-line ValueError that names the first place which does not fit."""
    if not isinstance(report, dict):
        raise ValueError("a report is a JSON object")
    if (found := report.get("schema")) != VERSION:
        again = "; measure again" if found in OLDER else ""
        raise ValueError(f"schema {found!r} is not {VERSION!r}{again}")
    check_schema(report, SCHEMA, "the report")
    for i, row in enumerate(report["rows"]):
        place = f"rows[{i}]"
        if (section := row["section"]) not in SECTIONS:
            known = ", ".join(SECTIONS)
            raise ValueError(f"{place}: section {section!r} is not one of {known}")
        if row["status"] != "ok":
            if "reason" not in row:
                raise ValueError(f"{place}: status {row['status']!r} without a reason")
            continue
        check_schema(row, SECTIONS[section], "the report", place)
        if section == "parity":
            if not row["latent_error_by_step"]:
                raise ValueError(f"{place}: 'latent_error_by_step' is empty")
            if "reference" in (row.get("sets") or {}):
                schema = {"": _WITH_REFERENCE, "absolute_difference": _INTERVAL}
                check_schema(row["sets"], schema, "the report", f"{place}.sets")


def write(report: Report, path: Path | None, paths: bool = False) -> None:
    """Write a report as JSON to ``path``, to standard output for "-", nowhere for None.

    The file is whole or not there at all. paths: keep whole paths of files, not only their names.
    """
    if path is not None:
        write_text(json_text(finite(report if paths else without_paths(report))), path)


def write_partial(report: Report, path: Path | None, paths: bool = False) -> None:
    """Keep what is measured so far as <name>.partial, so that it is there however the run ends."""
    if path is not None and path != STDOUT:
        write({**report, "complete": False}, partial_path(path), paths)


def partial_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")
