"""A report beside an older one: ratios of times, and which of them are regressions.

A regression is a time that grew by more than the noise of both runs explains: its 5 % quantile lies
above the old 95 % quantile, and the medians differ by more than `LEAST`. Where one of the two times
is noisy, or its run was not to be quoted, that is not enough to tell, and only what is far beyond
any noise is a regression: a 5 % quantile of `FAR` times the old 95 % quantile, or a median of
`VERY_FAR` times. Times of another machine are shown and not judged.
"""

from __future__ import annotations

from typing import Any

from dit_bench.hardware import same_processor
from dit_bench.load import busy_row, not_quoted

LEAST = 0.03
FAR, VERY_FAR = 3.0, 10.0
NOISY = 3
"""Exit code where nothing is a regression and something is too noisy to tell."""
_KEY = ("model", "size", "what", "images", "name")
_MACHINE = ("cpu", "gpu")
_SETTINGS = ("threads", "device")


def compare_reports(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """JSON-ready: "rows", one for each time that both have, "notes" on what the machines differ in,
    and "lost": what had a time and has none now, being wrong, not run or left out.

    A row holds the key, both medians, "ratio" (new over old) and "verdict": "regression",
    "quicker", "no difference shown", "noisy" or "another machine".

    Raises ValueError where the reports have nothing in common.
    """
    before = {_key(row): row for row in old["measurements"] if row["status"] == "ok"}
    notes = _differences(new, old)
    sure = not_quoted(new) is None and not_quoted(old) is None
    rows, lost = [], []
    there = {_key(row) for row in new["measurements"]}
    for row in new["measurements"]:
        other = before.get(_key(row))
        if other is None:
            continue
        if row["status"] != "ok":
            lost.append(f"{_title(row)}: {row['status']} now ({row['reason']})")
            continue
        if row["what"] == "image" and _sampling(new) != _sampling(old):
            continue
        ratio = row["ms"]["median"] / other["ms"]["median"]
        rows.append(
            {key: row[key] for key in _KEY}
            | {"old_ms": other["ms"]["median"], "new_ms": row["ms"]["median"], "ratio": ratio}
            | {"verdict": "another machine" if notes else _verdict(row, other, ratio, sure)}
        )
    if not rows and not lost:
        raise ValueError("the two reports have no measurement in common")
    lost += [f"{_title(row)}: not measured now" for key, row in before.items() if key not in there]
    interrupted = new["interrupted"]
    return {"rows": rows, "notes": notes, "lost": lost, "interrupted": interrupted, "least": LEAST}


def regressions(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in comparison["rows"] if row["verdict"] == "regression"]


def exit_code(comparison: dict[str, Any], strict: bool = False) -> int:
    """1 for a regression, `NOISY` where something could not be judged for noise, else 0.

    strict: 1 for everything that was not judged: on another machine, lost, or interrupted too.
    """
    verdicts = {row["verdict"] for row in comparison["rows"]}
    unjudged = verdicts & {"noisy", "another machine"} or comparison["lost"]
    if "regression" in verdicts or (strict and (unjudged or comparison["interrupted"])):
        return 1
    return NOISY if "noisy" in verdicts else 0


def _verdict(new: dict[str, Any], old: dict[str, Any], ratio: float, sure: bool) -> str:
    if new["ms"] == old["ms"]:  # a run beside itself
        return "no difference shown"
    if not sure or any(row["noisy"] or busy_row(row) for row in (new, old)):
        most = old["ms"]["p95"]
        far = new["ms"]["p5"] > FAR * most or new["ms"]["median"] > VERY_FAR * most
        return "regression" if far else "noisy"
    if new["ms"]["p5"] > old["ms"]["p95"] and ratio > 1 + LEAST:
        return "regression"
    if new["ms"]["p95"] < old["ms"]["p5"] and ratio < 1 - LEAST:
        return "quicker"
    return "no difference shown"


def _title(row: dict[str, Any]) -> str:
    return f"{row['model']} {row['what']}, {row['images']}, {row['name']}"


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in _KEY)


def _sampling(report: dict[str, Any]) -> tuple[Any, ...]:
    return report["settings"]["steps"], report["settings"]["sampler"]


def _differences(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """What of the machines differs, in which case times cannot be compared."""
    pairs = [
        (name, new["environment"]["hardware"].get(name), old["environment"]["hardware"].get(name))
        for name in _MACHINE
    ]
    pairs += [(name, new["settings"][name], old["settings"][name]) for name in _SETTINGS]
    return [
        f"{name}: {was!r} then, {now!r} now" for name, now, was in pairs
        if not (same_processor(now, was) if name == "cpu" else now == was)
    ]  # fmt: skip
