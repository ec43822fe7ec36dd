"""What a report of ``dit-bench`` holds, as JSON, and a check of it.

The schemas are in the language of `dit_engine.json_files`.
"""

from __future__ import annotations

from typing import Any

from dit_engine.json_files import check_schema

VERSION = "dit-bench/2"
OLDER = ("dit-bench/1",)
KINDS = ("forward", "step", "decode", "image")
PARTS = ("patch_embed", "conditioning", "adaln", "attention", "mlp", "final")

SCHEMA: dict[str, dict[str, str]] = {
    "": {
        "schema": "text",  # VERSION
        "created": "text",  # ISO 8601, UTC
        "command": "list",  # the arguments
        "environment": "object",
        "settings": "object",
        "ceilings": "object?",
        "energy": "text?",  # whose it is, or why there is none
        "load_average": "number?",  # of the last minute, before the run
        # Also "other_load": processors that others kept busy while times were taken, or null.
        "models": "list",
        "measurements": "list",
        "parity": "list",  # reports of dit_bench.parity, one a model
        "interrupted": "bool",
    },
    "environment": {"hardware": "object", "versions": "object", "instruction_sets": "list"},
    "environment.hardware": {"cpu": "text"},
    "settings": {
        "backend": "text", "precision": "text", "device": "text", "threads": "number",
        "rounds": "number", "seconds": "number", "steps": "number", "sampler": "text",
        "noise_bound": "number",
    },
    "ceilings": {
        "copy_gb_s": "number", "matmul_tflop_s": "object", "missing": "object", "measured": "text",
        "matmul_size": "number",
    },
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
    },
    "parity[]": {
        "model": "text", "n": "number", "subjects": "list", "settings": "object",
        "interrupted": "bool",
    },
    "parity[].subjects[]": {
        "backend": "text", "precision": "text", "latent_error_by_step": "list",
        "final_latent_error": "object",
    },
    # Errors that are not finite are null here.
    "parity[].subjects[].final_latent_error": {"mean": "number?", "max": "number?"},
    # Only with a VAE. null is infinite, of equal images, unless an image is not finite.
    "parity[].subjects[].psnr_db": {
        "median": "number?", "min": "number?", "not_finite": "number",
    },
}  # fmt: skip

# Of every measurement whose status is "ok". Times in milliseconds of one call.
MEASURED = {
    "ms": "object", "noisy": "bool", "images_s": "number", "samples_ms": "list",
    "setup_s": "number", "first_call_s": "number",
}  # fmt: skip
SPREAD = {"p5": "number", "median": "number", "p95": "number", "n": "number"}


def validate(report: Any) -> None:
    """Raise a one-line ValueError that names the first place where ``report`` is none."""
    if not isinstance(report, dict):
        raise ValueError("a report is a JSON object")
    if report.get("schema") != VERSION:
        found = report.get("schema")
        again = "; measure again" if isinstance(found, str) and found in OLDER else ""
        raise ValueError(f"schema {found!r} is not {VERSION!r}{again}")
    check_schema(report, SCHEMA, "the report")
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
