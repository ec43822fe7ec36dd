"""The short table at the end of a run, from its JSON: at most 60 lines."""

from __future__ import annotations

from typing import Any

from dit_bench.gpu_report import rows_with_status

LINE_LIMIT = 60
_FAILURES_SHOWN = 8

_HEAD = (
    f"{'operator':<26}{'shape':<26}{'by':<11}{'ms':>9}{'rate':>17}{'ceil.':>6}"
    f"{'×eager':>8}{'×comp.':>8}"
)
_HEAD_MEANS = (
    "by: whose implementation; ms: median; ceil.: rate over a large matrix product's or copy's; "
    "×eager, ×comp.: how often as quick as torch, and as torch.compile"
)

Values = dict[str, Any]
Row = dict[str, Any]


def format_table(values: Values, short: bool = False) -> str:
    """Everything that was measured, shortly; the JSON has the rest. short: as `operator_lines`."""
    first, last = environment_lines(values), failure_lines(values)
    middle = [*model_lines(values), *pixel_lines(values), *operator_lines(values, short),
              *peer_lines(values), *decode_lines(values)]  # fmt: skip
    room = LINE_LIMIT - len(first) - len(last) - 1
    if len(middle) > room:
        middle = [*middle[: room - 1], f"… {len(middle) - room + 1} more lines: see the JSON"]
    return "\n".join([*first, *middle, *last, verdict(values)])


def environment_lines(values: Values) -> list[str]:
    environment, ceilings = values.get("environment", {}), values.get("ceilings")
    name = environment.get("gpu") or environment.get("cpu")
    versions = f"torch {environment.get('torch')}, Python {environment.get('python')}"
    if environment.get("driver"):
        versions = f"driver {environment['driver']}, CUDA {environment.get('cuda')}, {versions}"
    packages = environment.get("packages") or {}
    if packages.get("triton"):
        versions += f", Triton {packages['triton']}"
    lines = [f"{name}: {versions}"]
    if ceilings:
        rates = [f"{k} {v:.3g} TFLOP/s" for k, v in ceilings["matmul_tflop_s"].items()]
        lines.append(f"ceilings: {', '.join(rates)}; copy {ceilings['copy_gb_s']:.4g} GB/s")
    return lines


WIDTH = len(_HEAD)


def operator_lines(values: Values, short: bool = False) -> list[str]:
    """A line an implementation and timed shape, with its speed-ups; short: with its time alone."""
    rows = [r for r in values.get("operators", []) if "ms" in r and not r.get("opponent")]
    checked = [r for r in values.get("operators", []) if "error" in r and not r.get("opponent")]
    if not checked:
        return []
    right = sum(r["status"] == "ok" for r in checked)
    lines = [f"operators: {right} of {len(checked)} checks passed"]
    if short:
        return lines + [f"{_short(r['operator'])} {r['shape']} {r['impl']}: "
                        f"{r['ms']['median']:.4f} ms" for r in rows]  # fmt: skip
    lines += [_HEAD_MEANS, _HEAD]
    for r in rows:
        percent = r["percent_of_ceiling"]
        lines.append(
            f"{_short(r['operator']):<26}{r['shape'][:25]:<26}{r['impl']:<11}"
            f"{r['ms']['median']:>9.4f}{r['rate']:>9.3g} {r['unit']:<7}"
            f"{'-' if percent is None else format(percent, '.0f') + '%':>6}"
            f"{_times(r, 'eager'):>8}{_times(r, 'compile'):>8}"
        )
    return lines


def peer_lines(values: Values) -> list[str]:
    """Other attention kernels, a line a shape."""
    lines: dict[tuple[str, str], list[str]] = {}
    for r in values.get("operators", []):
        known = ("eager", "compile", "reference")
        if r.get("opponent") and r["operator"] == "attention" and r["impl"] not in known:
            text = f"{r['ms']['median']:.4f} ms" if "ms" in r else "-"
            lines.setdefault((r["shape"], r["dtype"]), []).append(f"{r['impl']} {text}")
    return [f"attention {shape}: {', '.join(found)}" for (shape, _), found in lines.items()]


def decode_lines(values: Values) -> list[str]:
    """The VAE's decoder, a line a batch."""
    lines: dict[tuple[int, int], list[str]] = {}
    for r in values.get("decode", []):
        if "ms" in r:
            text = f"{r['contender']} {r['ms']['median']:.3f} ms"
            lines.setdefault((r["pixels"], r["batch"]), []).append(text)
    return [f"decode {px} px, batch {n}: {', '.join(found)}" for (px, n), found in lines.items()]


def pixel_lines(values: Values) -> list[str]:
    """Generations to pixels, a line a model."""
    lines: dict[tuple[str, int], list[str]] = {}
    for r in values.get("pixels", []):
        if "images_per_s" in r:
            text = f"{r['contender']} {r['images_per_s']:.4g} images/s"
            lines.setdefault((r["model"], r["batch"]), []).append(text)
    return [f"{m} to pixels, N={n}: {', '.join(found)}" for (m, n), found in lines.items()]


def model_lines(values: Values) -> list[str]:
    """A line a model, backend and precision: ms a forward in its quickest form, images a second."""
    forwards, made = quickest_forms(values.get("forwards", [])), values.get("generate", [])
    cells: dict[tuple[str, str], dict[str, str]] = {}
    columns: dict[str, None] = {}
    for rows, letter, text in (
        (forwards, "B", lambda r: f"{r['ms']['median']:.3f}"),
        (made, "N", lambda r: f"{r['images_per_s']:.4g}"),
    ):
        rows = [r for r in rows if "ms" in r or "images_per_s" in r]
        for batch in sorted({r["batch"] for r in rows}):
            columns[f"{letter}={batch}"] = None
        for r in rows:
            line = cells.setdefault((r["model"], r["contender"]), {})
            line[f"{letter}={r['batch']}"] = text(r)
    if not cells:
        return []
    lines = ["models: ms a forward of B rows (quickest of call, graph, step); images/s of N images"]
    lines.append(f"{'':<26}" + "".join(f"{c:>9}" for c in columns))
    for (model, contender), line in cells.items():
        numbers = "".join(f"{line.get(c, '-'):>9}" for c in columns)
        lines.append(f"{model:<6}{contender:<20}{numbers}")
    return lines


def quickest_forms(forwards: list[Row]) -> list[Row]:
    """Of a model's contender and batch the quickest of its forms: call, CUDA graph, fused step."""
    best: dict[tuple[str, str, int], Row] = {}
    for row in forwards:
        if "ms" not in row:
            continue
        name = row["contender"].removesuffix(" graph").removesuffix(" step")
        key = (row["model"], name, row["batch"])
        if key not in best or row["ms"]["median"] < best[key]["ms"]["median"]:
            best[key] = row | {"contender": name}
    return list(best.values())


def failure_lines(values: Values) -> list[str]:
    failed = rows_with_status(values, "failed")
    lines = [f"LATE {r['section']}: {r['reason']}" for r in rows_with_status(values, "late")]
    for r in failed[:_FAILURES_SHOWN]:
        what = [str(r[k]) for k in ("section", "operator", "model", "shape", "dtype", "impl",
                                    "contender", "batch") if k in r]  # fmt: skip
        lines.append(f"FAILED {' '.join(what)}: {r['reason']}"[:160])
    if len(failed) > _FAILURES_SHOWN:
        lines.append(f"… {len(failed) - _FAILURES_SHOWN} more failures: see the JSON")
    return lines


def verdict(values: Values) -> str:
    failed, left_out = (len(rows_with_status(values, s)) for s in ("failed", "skipped"))
    state = "complete" if values.get("complete") else "incomplete"
    seconds = f" in {values['seconds']:.0f} s" if "seconds" in values else ""
    return f"{state}{seconds}: {failed} failed, {left_out} skipped"


def _short(operator: str) -> str:
    names = {"gate_residual_layernorm_modulate": "gate_res_layernorm_mod",
             "layernorm_modulate_quantize": "layernorm_mod_quantize"}  # fmt: skip
    return names.get(operator, operator)


def _times(row: Row, other: str) -> str:
    value = row["speedup_over"].get(other)
    return "-" if value is None else f"{value:.2f}"
