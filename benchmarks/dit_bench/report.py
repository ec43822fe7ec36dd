"""The report: every measurement writes it as JSON, and tables, figures and pages show it.

A report is an object with the keys of `SCHEMA`. Its "rows" are the measurements. Every row has

- "section": what was done, one of `SECTIONS`, which also lists what rows of that section hold;
- "case": what it was done on, as text, such as "XL/2, batch 2" or "attention N=2 T=256 H=16 d=72";
- "contender": what did it, such as "lean bf16", "openvino bf16" or, of an operator, "native";
- "role": "subject" is what the run is about, "peer" is what it is compared with, "other network"
  computes another function, and "part" is a part of the work that is timed by itself;
- "status": "ok"; "wrong" (its result is wrong, so it was not timed); "skipped" (it cannot run here,
  or no time was left); "failed" (it broke); "late" (the run had to be ended). Each status except
  "ok" has a "reason".

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
KINDS = ("models", "cpu", "gpu", "operators", "parity", "quality", "fid", "gflops", "scaling")
"""Which command wrote the report; "models" is ``dit-bench --model …``."""
WORK = ("forward", "step", "decode", "image")
"""The sections of ``dit-bench --only``: a forward, a guided step, a decode, a whole generation."""
PARTS = ("patch_embed", "conditioning", "adaln", "attention", "mlp", "final")
"""The parts of a model whose cost is given."""
NO_VERDICT = "busy: no verdict"

Report = dict[str, Any]
Row = dict[str, Any]


def _all(keys: str, kind: str) -> dict[str, str]:
    return dict.fromkeys(keys.split(), kind)


_COST: Schema = {"parts{}": {"macs": "number"}, "total": _all(
    # Of one image and one forward; flops = 2 · macs; counted_flops is torch's own count.
    "parameters trained_parameters? macs flops counted_flops", "number")}  # fmt: skip
_BYTES = _all("total anonymous", "number")

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
        "models?": "list",  # what the models of the rows cost
        "rows": "list",
        "ratios?": "list",  # of kind "cpu": times of one contender over those of another
        "comparison?": "object",  # with an older report
        "parts_done?": "text[]",  # of kind "gpu"
        "choices?": "object",  # device → part of a forward → candidate → ms, as lean measured them
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
    **{f"models[].cost.{place}": keys for place, keys in _COST.items()},
    "rows[]": {
        **_all("section case contender", "text"),
        "role?": ("subject", "peer", "other network", "part"),
        "status": ("ok", "wrong", "skipped", "failed", "late"),
        **_all("reason? verdict? result? precision? model? operator? shape? dtype? metric? remark? "
               "bound_by?", "text"),
        **_all("images? images_s? setup_s? first_call_s? gflops? tflop_s? flops_per_byte? flops? "
               "percent_of_matmul? percent_of_copy? built_mib? peak_mib? conditioning_ms? "
               "fraction? recognised? parameters?", "number"),
        **_all("size? error? bound? goal? other_load? percent_of_ceiling? n_reference? distance? "
               "fewer_than_features? published_gflops? published_million_parameters?", "number?"),
        **_all("bytes? rate? idle_ms? busy_ms? value? gmacs?", "positive"),
        **_all("neighbours? steps? launches?", "count"), "n?": "count?",
        **_all("noisy? interrupted?", "bool"), "unit?": ("TFLOP/s", "GB/s"),
        **_all("ms? ratio? settings? speedup_over? operators_ms? needed? after_load? by_class? "
               "peak_while_loading? peak_while_running? final_latent_error? parts? total? "
               "device_state? host_launches?", "object"),
        **_all("psnr_db? sets?", "object?"), "shares?": "list", "samples_ms?": "number[]",
        "latent_error_by_step?": "number?[]",
    },
    "rows[].ms": {"median": "positive", **_all("p5? p95?", "positive"), "n?": "count"},
    "rows[].ratio": _all("p5 median p95", "number"),
    "rows[].speedup_over": {"<text>": "number"},  # contender → its time over this one's
    # The parts of a forward's time: "ms" is the forward's, "operators_ms" that of each part alone.
    "rows[].shares[]": {"part": "text", **_all("ms share", "number"), "count?": "count"},
    "rows[].operators_ms": {"<text>": "number"},
    # Sampled while a part of a GPU run was measured; empty without samples.
    "rows[].device_state": {**_all("sm_mhz? power_w? celsius?", "object"), "throttled?": "text[]"},
    # Resident bytes of a lean forward; "value" is the peak over what is needed.
    "rows[].needed": {"<text>": "count"},
    "rows[].after_load": _BYTES,
    "rows[].peak_while_loading": _BYTES,
    "rows[].peak_while_running": _BYTES,
    # A backend against eager float32 from the same noise, for "n" images. Errors that are not
    # finite are null. A null PSNR is infinite (of equal images) unless an image is not finite.
    "rows[].final_latent_error": _all("mean max", "number?"),
    "rows[].psnr_db": {**_all("median min", "number?"), "not_finite": "number"},
    "rows[].sets": {
        "metric": "text", "n": "count", "between": "number", "reference?": "text",
        "n_reference?": "number?", "absolute_difference?": "object",
        **_all("to_reference? eager_to_reference? confidence? resamples?", "number"),
    },
    "rows[].sets.absolute_difference": {"value": "number", **_all("low high", "number?")},
    "rows[].by_class": {"<text>": "number"},
    **{f"rows[].{place}": keys for place, keys in _COST.items()},
    "ratios[]": {
        "case": "text", "ours": "text", "theirs": "text", "goal": "number?", "result": "text",
        "reason?": "text",  # why there is no ratio
        "ratio?": "object", "ours_ms?": "positive", "theirs_ms?": "positive",
        "conditioned?": "number",  # the ratio with what lean computes once before its steps
    },
    "ratios[].ratio": {"median": "number", **_all("p5 p95", "number?")},
    "comparison": {"rows": "list", "notes": "text[]", "lost?": "text[]"},
    "comparison.rows[]": {
        **_all("case section contender verdict", "text"), **_all("old_ms new_ms ratio", "number"),
    },
}  # fmt: skip

SECTIONS: Mapping[str, str] = {
    # Work of a model for "images" rows (forward) or images (all others).
    **dict.fromkeys(WORK, "ms precision model images noisy images_s"),
    "operator": "operator shape dtype",
    "profile": "ms precision shares operators_ms",
    "kernels": "ms launches shares",  # of one step, by torch's profiler
    "busy": "neighbours idle_ms busy_ms ratio",  # "ratio": beside busy programs over idle
    "check": "",  # without a time
    "memory": "value needed after_load peak_while_loading peak_while_running",
    "parity": "model n settings latent_error_by_step final_latent_error",
    "distance": "metric distance",  # between sets of images
    "recognised": "n fraction by_class",  # images that lie nearest to their own class
    "cost": "model size parts total",  # of a network per image
    "scaling": "gmacs steps distance n",  # a network after "steps" of training
}
"""Section → what its rows must hold where their status is "ok"."""


def new_report(
    kind: str, machine: Mapping[str, Any], settings: Mapping[str, Any], command: Sequence[str] = ()
) -> Report:
    """A report without rows. ``machine`` is what `dit_bench.machine.describe` returns."""
    return {
        "schema": VERSION, "kind": kind,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": list(command), "machine": dict(machine), "settings": dict(settings),
        "rows": [], "complete": False,
    }  # fmt: skip


def read(path: Path, *kinds: str) -> Report:
    """The report in a JSON file, whose kind must be one of ``kinds`` if any are given.

    Raises ValueError, which names the file, for any other file, and OSError.
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
        raise ValueError(f"schema {found!r} is not {VERSION!r}")
    check_schema(report, SCHEMA, "the report")
    for i, row in enumerate(report["rows"]):
        if (section := row["section"]) not in SECTIONS:
            known = ", ".join(SECTIONS)
            raise ValueError(f"rows[{i}]: section {section!r} is not one of {known}")
        for key in SECTIONS[section].split() if row["status"] == "ok" else ["reason"]:
            if row.get(key) in (None, []):
                raise ValueError(f"rows[{i}] has no {key!r} (status {row['status']!r})")


def write(report: Report, path: Path | None, paths: bool = False) -> None:
    """Write a report as JSON to ``path``, to standard output for "-", nowhere for None.

    The file is written whole or not at all. paths: keep whole paths of files, not only their names.
    """
    if path is not None:
        write_text(json_text(finite(report if paths else without_paths(report))), path)


def write_partial(report: Report, path: Path | None, paths: bool = False) -> None:
    """Write the rows so far to <name>.partial, so that they are kept however the run ends."""
    if path is not None and path != STDOUT:
        write({**report, "complete": False}, partial_path(path), paths)


def partial_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")
