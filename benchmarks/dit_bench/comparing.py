"""A report beside an older one: ratios of times, and which of them are regressions.

A regression is a time that grew by more than noise explains: its 5 % quantile lies above the old
95 % quantile, and the medians differ by more than `LEAST`. Times of another machine are shown, but
nothing is called a regression there; the same holds for noisy ones.
"""

from __future__ import annotations

from typing import Any

from dit_bench.hardware import same_processor

LEAST = 0.03
_KEY = ("model", "size", "what", "images", "name")
_MACHINE = ("cpu", "gpu")
_SETTINGS = ("threads", "device")


def compare_reports(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """JSON-ready: "rows", one for each time that both have, "notes" on what the machines differ in,
    and "lost": what had a time and has none now, because it is wrong or could not run.

    A row holds the key, both medians, "ratio" (new over old) and "verdict": "regression",
    "quicker", "no difference shown", "noisy" or "another machine".

    Raises ValueError where the reports have nothing in common.
    """
    before = {_key(row): row for row in old["measurements"] if row["status"] == "ok"}
    notes = _differences(new, old)
    rows, lost = [], []
    for row in new["measurements"]:
        other = before.get(_key(row))
        if other is None:
            continue
        if row["status"] != "ok":
            what = f"{row['model']} {row['what']}, {row['images']}, {row['name']}"
            lost.append(f"{what}: {row['status']} now ({row['reason']})")
            continue
        if row["what"] == "image" and _sampling(new) != _sampling(old):
            continue
        ratio = row["ms"]["median"] / other["ms"]["median"]
        rows.append(
            {key: row[key] for key in _KEY}
            | {"old_ms": other["ms"]["median"], "new_ms": row["ms"]["median"], "ratio": ratio}
            | {"verdict": "another machine" if notes else _verdict(row, other, ratio)}
        )
    if not rows and not lost:
        raise ValueError("the two reports have no measurement in common")
    return {"rows": rows, "notes": notes, "lost": lost, "least": LEAST}


def regressions(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in comparison["rows"] if row["verdict"] == "regression"]


def _verdict(new: dict[str, Any], old: dict[str, Any], ratio: float) -> str:
    if new["noisy"] or old["noisy"]:
        return "noisy"
    if new["ms"]["p5"] > old["ms"]["p95"] and ratio > 1 + LEAST:
        return "regression"
    if new["ms"]["p95"] < old["ms"]["p5"] and ratio < 1 - LEAST:
        return "quicker"
    return "no difference shown"


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
