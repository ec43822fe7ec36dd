"""Reports: their schema, their tables and their page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import made_up
import pytest

from dit_bench.compare import compare_reports
from dit_bench.load import withdraw_verdicts
from dit_bench.outputs import csv_text, finite
from dit_bench.report import validate
from dit_bench.show.page import page
from dit_bench.show.plots import all_figures
from dit_bench.show.reports import report_tables
from dit_bench.show.tables import Table, show


def full_report() -> dict[str, Any]:
    """Work with verdicts, operators, parity and a comparison, as read from JSON."""
    report = made_up.report()
    for row in report["rows"]:
        if row["role"] == "peer" and row["status"] == "ok":
            row |= {"ratio": made_up.ratio(2.0), "verdict": "lean bf16 is 12.34× as quick",
                    "error": 1.5e-3, "bound": 1e-2}  # fmt: skip
    report["comparison"] = compare_reports(report, made_up.report())
    report["rows"] += made_up.parity() + made_up.operators()["rows"]
    return finite(report)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("more", 1, None),
        ("load_average", None, None),
        ("schema", "dit-bench/2", "'dit-bench/2' is not 'dit-bench/3'"),
        ("kind", "odd", "'kind' is 'odd', not one of 'models', 'cpu'"),
        ("rows", ..., "the report has no 'rows'"),
        ("machine.threads", "2", "machine: 'threads' is str, not count"),
        ("models.1.cost.total.macs", True, "models[1].cost.total: 'macs' is bool, not number"),
        ("rows.2.images", None, "rows[2]: 'images' is NoneType, not number"),
        ("rows.2.images", ..., "rows[2] has no 'images'"),
        ("rows.3.ms.median", 0, "rows[3].ms: 'median' is int, not positive (0)"),
        ("rows.0.status", "wrong", "rows[0] has no 'reason' (status 'wrong')"),
        ("rows.0.section", "all", "rows[0]: section 'all' is not one of forward, step, decode"),
        ("rows.14.latent_error_by_step", [], "has no 'latent_error_by_step'"),
        ("rows.14.sets.absolute_difference.value", ..., "absolute_difference has no 'value'"),
    ],
)
def test_the_schema_names_what_is_wrong(path: str, value: Any, said: str | None) -> None:
    report = made_up.report()
    report["rows"][14:14] = made_up.parity()
    place: Any = report
    *way, last = path.split(".")
    for key in way:
        place = place[int(key) if key.isdecimal() else key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    if said is None:
        validate(report)
    else:
        with pytest.raises(ValueError, match=re.escape(said)):
            validate(report)


def test_tables_show_everything_and_say_what_is_missing_and_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = full_report() | {"complete": False}
    validate(report)
    show(report_tables(report))
    shown = capsys.readouterr().out
    for text in (
        "skipped: no <such> processor",
        "fp8: none here",
        "INTERRUPTED",
        "a processor",
        "no difference shown",
        "layernorm_modulate",
        "311.1",
        "failed: RuntimeError",
    ):
        assert text in shown, text
    lines = [re.split("  +", line.strip()) for line in shown.splitlines()]
    assert ["lean bf16", "FD-Lite0", "2400", "0.0123", "0.0123", "0 to 0.0312", "95%", "builtin",
            "held-out", "unknown", "76.8123", "76.8000", "100"] in lines  # fmt: skip
    parity = {line[1]: line[3:] for line in lines if line[0] == "builtin"}
    assert parity["lean bf16"] == ["3.0e-03", "41.2", "1.0e-03", "2.0e-03", "5.0e-03", "30.0"]
    assert (parity["lean fp32"][1], parity["lean fp32"][-1]) == ("equal", "equal")
    assert parity["lean fp16"] == ["not finite"] * 2 + ["1.0e-03"] + ["not finite"] * 3
    assert not any("peak MiB" in line for line in lines)  # measured nowhere
    report["rows"].append(
        made_up.row("S/8", "image", 1, "lean bf16", "subject", 900.0, 50.0) | {"peak_mib": 3.0}
    )
    notes = [note for table in report_tables(report) for note in table.notes]
    for text in ("20 steps of ddpm", "MiB"):
        assert any(text in note for note in notes), text


@pytest.mark.parametrize("where", ["run", "row"])
def test_what_is_not_to_be_quoted_names_no_winner(
    where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = full_report()
    del report["comparison"]
    report["rows"] = report["rows"][:2]
    assert report["rows"][1]["role"] == "peer"
    (report if where == "run" else report["rows"][1])["other_load"] = 0.8
    withdraw_verdicts(report)
    show(report_tables(report))
    shown, made = capsys.readouterr().out, page(report, all_figures(report))
    for text in (shown, csv_text(report), made):
        assert "busy: no verdict" in text and "as quick" not in text
    said = "busy (other programs used 0.80 processors while times were taken): these figures"
    for text in (shown, made):
        assert (said in text) == (where == "run")


class Sources(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


def test_a_page_needs_nothing_but_itself_and_begins_with_what_is_wrong() -> None:
    report = full_report()
    assert "class=wrong" not in page(report, {}) and "class=warning" not in page(report, {})
    report["rows"][0] |= {"status": "wrong", "reason": "computes <another> function"}
    made = page(report | {"complete": False}, all_figures(report))
    parsed = Sources()
    parsed.feed(made)
    assert parsed.tags.count("img") == 3 and "script" not in parsed.tags
    assert all(source.startswith("data:") for source in parsed.found) and "url(" not in made
    wrong = "WRONG: S/8, batch 1, forward: lean bf16 computes &lt;another&gt; function"
    assert f"<p class=wrong>{wrong}</p>\n<p class=warning>INTERRUPTED" in made.split("<h2>")[0]
    assert made.count("<table>") == 8


def test_a_table_without_what_is_empty_or_the_same() -> None:
    table = Table("t", ["of", "a", "N", "x"], rows=[["b", "–", "9", "1"], ["c", "", "9", "2"]])
    assert table.markdown() == "**t** (N 9)\n\n| of | x |\n|---|---:|\n| b | 1 |\n| c | 2 |\n"
    assert table.text() == "t\nof   N   x\n──────────\nb    9   1\nc    9   2\n"


@pytest.mark.parametrize("width", [80, 110, 150])
def test_a_narrow_terminal_breaks_no_number(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is wider than the terminal, what, median and verdict are there, and every number is
    one that the wide tables have. Piped output follows COLUMNS."""

    def numbers(text: str) -> set[str]:
        return set(re.findall(r"\d[\d.,e+-]*\d|\d", text))

    monkeypatch.setenv("COLUMNS", str(width))
    show(report_tables(full_report()), wide=True)
    wide = capsys.readouterr().out
    assert any("eager bf16" in line and "12.34×" in line and "22.63" in line
               for line in wide.splitlines())  # fmt: skip
    show(report_tables(full_report()))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    left_out = r"--wide\s+shows\s+the\s+other\s+columns,\s+\d+\s+of\s+them"
    assert re.search(left_out, shown) and not re.search(left_out, wide)
    assert numbers(re.sub(left_out, "", shown)) <= numbers(wide)
    for text in ("5.657", "12.34×", "no", "difference", "skipped:", "first call s"):
        assert (text in shown) == (text != "first call s"), text
