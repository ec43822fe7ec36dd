"""What a report of ``dit-bench`` holds, as JSON, and a check of it.

The schemas are in the language of `dit_engine.io.json_files`.
"""

from __future__ import annotations

from typing import Any

from dit_engine.io.json_files import Schema, check_schema

VERSION = "dit-bench/2"
OLDER = ("dit-bench/1",)
KINDS = ("forward", "step", "decode", "image")
RATES = ("gflops?", "tflop_s?", "percent_of_matmul?", "flops_per_byte?", "percent_of_copy?",
         "built_mib?", "peak_mib?", "joules_per_image?")  # fmt: skip
PARTS = ("patch_embed", "conditioning", "adaln", "attention", "mlp", "final")

SCHEMA: Schema = {
    "": {
        "schema": "text",  # VERSION
        "created": "text",  # ISO 8601, UTC
        "command": "list",  # the arguments
        "environment": "object",
        "settings": "object",
        "ceilings": "object?",
        "energy": "text?",  # whose it is, or why there is none
        "load_average": "number?",  # of the last minute, before the run
        "other_load?": "number?",  # processors that others kept busy while times were taken
        "models": "list",
        "measurements": "list",
        "parity": "list",  # reports of dit_bench.quality.parity, one a model
        "interrupted": "bool",
        "failure?": "text",  # what ended the run early
        "operators?": "object",  # a report of dit_bench.operators
        "comparison?": "object",  # with an older report
    },
    "environment": {"hardware": "object", "versions": "object", "instruction_sets": "text[]"},
    "environment.hardware": {"cpu": "text"},
    "settings": {
        "backend": "text", "precision": "text", "device": "text", "threads": "number",
        "rounds": "number", "seconds": "number", "steps": "number", "sampler": "text",
        "noise_bound": "number",
    },
    "ceilings": {
        "copy_gb_s": "positive", "matmul_tflop_s": "object", "missing": "object",
        "measured": "text", "matmul_size": "number",
    },
    "ceilings.matmul_tflop_s": {"<text>": "positive"},
    "models[]": {
        "model": "text",  # "XL/2", or what was given
        "weights": "text",  # "random", or where they came from
        "size": "number?",  # pixels along a side
        "config": "object",
        "tokens": "number",
        "cost": "object",
        "decoder": "object?",
    },
    "models[].config": {"numerics": "text"},
    "models[].decoder": {"macs": "number"},
    "models[].cost": {"parts": "object", "total": "object"},
    "models[].cost.parts": dict.fromkeys(PARTS, "object"),
    **{f"models[].cost.parts.{part}": {"macs": "number"} for part in PARTS},
    # One image and one forward; flops = 2 · macs; counted_flops is torch's own count.
    "models[].cost.total": {
        "parameters": "number", "macs": "number", "flops": "number", "counted_flops": "number",
    },
    "measurements[]": {
        "model": "text",
        "size": "number?",
        "what": "text",  # forward, step, decode or image
        "images": "number",
        "name": "text",  # backend and precision
        "role": "text",  # subject, peer or other network
        "precision": "text",
        "status": "text",  # ok; wrong: not timed, for its result; skipped: could not run
        "reason?": "text", "verdict?": "text", "bound_by?": "text", "noisy?": "bool",
        "error?": "number?", "bound?": "number?", "ratio?": "object", "other_load?": "number?",
        **dict.fromkeys(RATES, "number"),
    },
    "measurements[].ratio": {"p5": "number", "median": "number", "p95": "number"},
    "parity[]": {
        "model": "text", "n": "number", "subjects": "list", "settings": "object",
        "interrupted": "bool",
    },
    "parity[].subjects[]": {
        "backend": "text", "precision": "text", "latent_error_by_step": "number?[]",
        "final_latent_error": "object", "sets?": "object?",
    },
    # Errors that are not finite are null here.
    "parity[].subjects[].final_latent_error": {"mean": "number?", "max": "number?"},
    # Only with a VAE. null is infinite, of equal images, unless an image is not finite.
    "parity[].subjects[].psnr_db": {
        "median": "number?", "min": "number?", "not_finite": "number",
    },
    "parity[].subjects[].sets": {
        "metric": "text", "n": "number", "between": "number", "reference?": "text",
    },
    "parity[].subjects[].sets.absolute_difference": {
        "value": "number", "low": "number?", "high": "number?",
    },
    "comparison": {"rows": "list", "notes": "text[]", "lost?": "text[]"},
    "comparison.rows[]": {
        "model": "text", "what": KINDS, "images": "number", "name": "text", "old_ms": "number",
        "new_ms": "number", "ratio": "number", "verdict": "text",
    },
}  # fmt: skip

# Of every measurement whose status is "ok". Times in milliseconds of one call.
MEASURED = {
    "ms": "object", "noisy": "bool", "images_s": "number", "samples_ms": "number[]",
    "setup_s": "number", "first_call_s": "number",
}  # fmt: skip
SPREAD = {"p5": "number", "median": "number", "p95": "number", "n": "number"}


# Additional values of paired sets that have a reference.
WITH_REFERENCE = {
    "n_reference": "number?", "to_reference": "number", "eager_to_reference": "number",
    "absolute_difference": "object", "confidence": "number", "resamples": "number",
}  # fmt: skip
OPERATORS = {"": {"operators": "list", "ceilings": "object"}, "operators[]": {"status?": "text"}}
# Values of every operator that was timed.
OPERATOR = {
    "": {
        "operator": "text", "shape": "text", "dtype": "text", "impl": "text", "ms": "object",
        "rate": "positive", "unit": "text", "bytes": "positive", "flops": "number",
        "percent_of_ceiling": "number?",
    },
    "ms": {"median": "number"},
}  # fmt: skip


def check_operators(values: Any, source: object, top: str = "") -> None:
    """Like `validate`, for a report of dit_bench.operators. The arguments are `check_schema`'s."""
    check_schema(values, OPERATORS, source, top)
    for i, row in enumerate(values["operators"]):
        if row.get("status") == "ok" and "rate" in row:
            place = f"{top}.operators[{i}]" if top else f"operators[{i}]"
            check_schema(row, OPERATOR, f"{source}: measure again", place)


def validate(report: Any) -> None:
    """Raise a one-line ValueError that names the first place where ``report`` is none."""
    if not isinstance(report, dict):
        raise ValueError("a report is a JSON object")
    if report.get("schema") != VERSION:
        found = report.get("schema")
        again = "; measure again" if isinstance(found, str) and found in OLDER else ""
        raise ValueError(f"schema {found!r} is not {VERSION!r}{again}")
    check_schema(report, SCHEMA, "the report")
    if "operators" in report:
        check_operators(report["operators"], "the report", "operators")
    for i, found in enumerate(report["parity"]):
        for k, row in enumerate(found["subjects"]):
            place = f"parity[{i}].subjects[{k}]"
            if not row["latent_error_by_step"]:
                raise ValueError(f"the report: {place}: 'latent_error_by_step' is empty")
            sets = row.get("sets") or {}
            if "reference" in sets:
                check_schema(sets, {"": WITH_REFERENCE}, "the report", f"{place}.sets")
    for i, row in enumerate(report["measurements"]):
        if row["what"] not in KINDS:
            raise ValueError(f"measurements[{i}]: {row['what']!r} is none of {', '.join(KINDS)}")
        if row["status"] == "ok":
            check_schema(row, {"": MEASURED, "ms": SPREAD}, "the report", f"measurements[{i}]")
            for name in ("p5", "median", "p95"):
                if not row["ms"][name] > 0:
                    raise ValueError(f"measurements[{i}].ms: {name!r} {row['ms'][name]} is not > 0")
        elif row["status"] not in ("wrong", "skipped") or "reason" not in row:
            raise ValueError(f"measurements[{i}]: status {row['status']!r} without a reason")
