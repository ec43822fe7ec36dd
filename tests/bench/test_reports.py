"""Reports: their schema, comparison with an older one, tables and pages."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import made_up
import pytest
from PIL import Image

from dit_bench.compare import compare_reports
from dit_bench.load import withdraw_verdicts
from dit_bench.outputs import csv_text
from dit_bench.report import finite, validate
from dit_bench.show.page import page
from dit_bench.show.plots import all_figures
from dit_bench.show.reports import report_tables
from dit_bench.show.tables import Table, fold, output_width, show

CHROMIUM = shutil.which("chromium")


def test_the_schema_takes_a_report() -> None:
    validate(made_up.report())
    validate(made_up.report() | {"ceilings": None, "load_average": None, "more": 1})


def damage(path: str, value: Any) -> dict[str, Any]:
    """A report in which the value at ``path`` is another, or is missing for ``...``."""
    report = made_up.report() | {"rows": made_up.report()["rows"] + made_up.parity()}
    place: Any = report
    *way, last = path.split(".")
    for key in way:
        place = place[int(key) if key.lstrip("-").isdecimal() else key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return report


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("schema", "dit-bench/0", "'dit-bench/0' is not 'dit-bench/3'"),
        ("schema", "dit-bench/2", "'dit-bench/2' is not 'dit-bench/3'; measure again"),
        ("kind", "odd", "'kind' is 'odd', not one of 'models', 'cpu'"),
        ("rows", ..., "the report has no 'rows'"),
        ("machine.threads", "2", "machine: 'threads' is str, not count"),
        ("machine.cpu", ..., "machine has no 'cpu'"),
        ("complete", 0, "'complete' is int, not bool"),
        ("models.1.cost.total.macs", True, "models[1].cost.total: 'macs' is bool, not number"),
        ("models.0.cost.parts.mlp", ..., "models[0].cost.parts has no 'mlp'"),
        ("rows.2.images", None, "rows[2]: 'images' is NoneType, not number"),
        ("rows.3.ms.median", ..., "rows[3].ms has no 'median'"),
        ("rows.3.ms.median", 0, "rows[3].ms: 'median' is int, not positive (0)"),
        ("rows.0.noisy", ..., "rows[0] has no 'noisy'"),
        ("rows.0.status", "odd", "rows[0]: 'status' is 'odd', not one of 'ok', 'wrong'"),
        ("rows.0.status", "wrong", "rows[0]: status 'wrong' without a reason"),
        ("rows.0.section", "all", "rows[0]: section 'all' is not one of forward, step, decode"),
        ("rows.-3.psnr_db.not_finite", ..., "psnr_db has no 'not_finite'"),
        ("rows.-2.latent_error_by_step", [], "'latent_error_by_step' is empty"),
        ("rows.-3.sets.absolute_difference", ..., "sets has no 'absolute_difference'"),
    ],
)
def test_the_schema_names_what_is_wrong(path: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        validate(damage(path, value))


def with_operators() -> dict[str, Any]:
    report = made_up.report()
    report["rows"] += made_up.operators()["rows"]
    return report


def slower(factor: float, width: float = 0.05) -> dict[str, Any]:
    """The made-up report with one time made longer."""
    report = made_up.report()
    row = report["rows"][0]
    row["ms"] = made_up.spread(row["ms"]["median"] * factor, width)
    return report


def test_paired_sets_are_shown_with_n_reference_and_interval(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = finite(
        made_up.report() | {"rows": made_up.report()["rows"] + made_up.parity()}
    )  # as it is read from JSON
    validate(report)
    show(report_tables(report), width=200)
    lines = capsys.readouterr().out.splitlines()
    (shown,) = (line.split() for line in lines if "held-out" in line)
    assert shown == [
        "builtin", "lean", "bf16", "FD-Lite0", "2400", "0.0123", "held-out", "unknown", "76.8123",
        "76.8000", "0.0123", "0", "to", "0.0312", "(95%)", "100",
    ]  # fmt: skip
    (same,) = (line.split() for line in lines if "lean fp32" in line)
    assert same[-2:] == ["equal", "equal"]
    (broken,) = (line.split() for line in lines if "lean fp16" in line)
    assert broken[4:] == ["1.0e-03", *["not", "finite"] * 5]


def test_too_few_resamples_have_no_interval(capsys: pytest.CaptureFixture[str]) -> None:
    parity = made_up.parity()
    sets = parity[0]["sets"]
    sets["resamples"] = 19
    sets["absolute_difference"] |= {"low": None, "high": None}
    show(report_tables(made_up.report() | {"rows": parity}), width=250)
    (shown,) = (line for line in capsys.readouterr().out.splitlines() if "held-out" in line)
    assert "none: below 20 resamples" in shown and "95%" not in shown


def test_a_row_is_one_line_where_the_output_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = Table("wide", [f"column {i}" for i in range(60)])
    table.add(*(f"a cell with {i} words" for i in range(60)))
    show([table])
    lines = [line for line in capsys.readouterr().out.splitlines() if "words" in line]
    assert len(lines) == 1 and all(f"a cell with {i} words" in lines[0] for i in range(60))


def test_tables_say_what_was_left_out_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    report = with_operators() | {"complete": False}
    report["comparison"] = compare_reports(slower(1.2), made_up.report())
    show(report_tables(report), width=250)
    macs = report["models"][0]["cost"]["total"]["macs"]
    shown = capsys.readouterr().out
    for text in ("skipped: no <such> processor", "fp8: none here", "INTERRUPTED", "a processor",
                 "regression", "layernorm_modulate", f"{macs / 1e9:.4g}", "311.1"):  # fmt: skip
        assert text in shown, text
    busy = "not to be quoted"
    assert busy not in shown
    show(report_tables(report | {"load_average": 3.0}), width=250)
    assert busy in capsys.readouterr().out


@pytest.mark.parametrize("where", ["run", "row"])
def test_what_is_not_to_be_quoted_names_no_winner(
    where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = made_up.report()
    peers = [row for row in report["rows"] if row.get("role") == "peer"]
    for row in peers:
        row |= {"ratio": made_up.ratio(2.0), "verdict": "lean bf16 is 2.00× as quick"}
    (report if where == "run" else report["rows"][1])["other_load"] = 0.8
    report["rows"] = report["rows"][:2]
    assert report["rows"][1] in peers
    withdraw_verdicts(report)
    show(report_tables(report), width=400)
    shown = capsys.readouterr().out
    for text in (shown, csv_text(report), page(report, all_figures(report, None))):
        assert "busy: no verdict" in text and "as quick" not in text
    said = "busy (other programs used 0.80 processors while times were taken): these figures"
    assert (said in shown) == (where == "run")


def test_tables_as_html_escape_their_cells() -> None:
    table = Table("a < b", ["x", "y"])
    table.add("<script>", 2)
    table.add("short")
    text = table.html()
    assert "<script>" not in text and "&lt;script&gt;" in text and "a &lt; b" in text
    assert text.count("<td") == 4


class Sources(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.fixture(scope="module")
def made_page() -> str:
    report = with_operators()
    sheets = [(name, Image.new("RGB", (40, 30), name)) for name in ("red", "blue")]
    return page(report, all_figures(report, made_up.scaling()), sheets)


def test_a_page_needs_nothing_but_itself(made_page: str) -> None:
    parsed = Sources()
    parsed.feed(made_page)
    assert parsed.tags.count("img") == 4 + 2 and "script" not in parsed.tags
    assert all(source.startswith("data:") for source in parsed.found)
    assert "url(" not in made_page and "no &lt;such&gt; processor" in made_page


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium (Debian's package of that name)")
def test_a_page_opens_in_a_browser_without_an_error(made_page: str, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.html", tmp_path / "bad.html"
    good.write_text(made_page, encoding="utf-8")
    bad.write_text(made_page.replace("</body>", "<script>throw 1</script></body>"), "utf-8")
    dom, said = browse(good, tmp_path)
    assert said == []
    assert "<figcaption>blue</figcaption>" in dom and "latency gflops" in dom
    assert any("Uncaught 1" in line for line in browse(bad, tmp_path)[1])  # it would be seen


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium (Debian's package of that name)")
def test_no_table_is_cut_at_1200_pixels(tmp_path: Path) -> None:
    report = made_up.report()
    names = ("lean bf16", "onnxruntime fp32")
    for row in report["rows"]:
        if row["status"] == "ok" and row.get("role") == "peer":
            row |= {"ratio": made_up.ratio(2.0), "verdict": f"{names[0]} is 12.34× as quick",
                    "contender": names[1], "error": 1e-3, "bound": 1e-2}  # fmt: skip
    script = (
        "<script>document.title = JSON.stringify([...document.querySelectorAll('.scroll')]"
        ".map(e => e.scrollWidth - e.clientWidth))</script></body>"
    )
    path = tmp_path / "page.html"
    path.write_text(page(report, {}).replace("</body>", script), encoding="utf-8")
    dom, said = browse(path, tmp_path)
    found = re.search(r"<title>(\[.*?\])</title>", dom)
    assert said == [] and found is not None
    assert found[1] == "[0,0,0,0]"


def test_a_page_begins_with_what_is_wrong() -> None:
    report = made_up.report()
    assert "<p class=wrong>" not in page(report, {}) and "<p class=warning>" not in page(report, {})
    report["rows"][0] |= {"status": "wrong", "reason": "computes <another> function"}
    report["load_average"] = 2.5
    text = page(report, {})
    wrong = "WRONG: S/8, batch 1, forward: lean bf16 computes &lt;another&gt; function"
    said = f"<p class=wrong>{wrong}</p>"
    assert said in text and "busy (load average 2.50" in text
    assert text.index(said) < text.index("<h2>")


def test_columns_that_are_empty_in_every_row_are_left_out() -> None:
    table = Table("t", ["", "a", "b", "c", "d"], left=1, right=1)
    table.add("x", 1, "–", "", "")
    table.add("y", "–", "", "–", "word")
    kept = table.filled()
    assert kept.columns == ["", "a", "d"] and kept.rows == [["x", "1", ""], ["y", "–", "word"]]
    assert [kept.words(i) for i in range(3)] == [True, False, True]
    head = report_tables(made_up.report())[3].filled().columns
    assert "J an image" not in head and "peak MiB" not in head and "TFLOP/s" in head


def browse(path: Path, folder: Path) -> tuple[str, list[str]]:
    """The page's DOM once it is loaded, and what was written to its console."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--v=0",
        "--virtual-time-budget=2000", "--window-size=1200,900", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_the_made_up_report_is_not_shared() -> None:
    first = made_up.report()
    kept = copy.deepcopy(first)
    made_up.report()["rows"][0]["ms"]["median"] = 0
    assert first == kept


def test_footnotes_stand_where_they_apply() -> None:
    def notes(report: dict[str, Any]) -> str:
        return "\n".join(note for table in report_tables(report) for note in table.notes)

    report = made_up.report()
    for text in ("whole generation", "decoder of its own", "MiB"):
        assert text not in notes(report).replace("a whole generation's are", ""), text
    report["rows"].append(
        made_up.row("S/8", "image", 1, "lean bf16", "subject", 900.0, 50.0) | {"peak_mib": 3.0}
    )
    for text in ("its error is that of one step", "20 steps of ddpm", "decoder of its own", "MiB"):
        assert text in notes(report), text


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d[\d.,e+-]*\d|\d", text))


def full_report() -> dict[str, Any]:
    report = with_operators()
    report["rows"] += made_up.parity()
    report["comparison"] = compare_reports(report, slower(1.0))
    for row in report["rows"]:
        if row.get("role") == "peer" and row["status"] == "ok":
            row |= {"ratio": made_up.ratio(2.0), "verdict": "lean bf16 is 12.34× as quick",
                    "error": 1.5e-3, "bound": 1e-2}  # fmt: skip
    return report


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 120, 150, 189])
def test_a_narrow_terminal_breaks_no_number(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is wider than the terminal, what, median and verdict are there, and every number is
    one that the wide tables have."""
    tables = report_tables(full_report())
    show(tables, wide=True)
    wide = capsys.readouterr().out
    show(tables, width=width)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    left_out = r"--wide\s+shows\s+the\s+other\s+columns,\s+\d+\s+of\s+them"
    assert numbers(re.sub(left_out, "", shown)) <= numbers(wide)
    assert bool(re.search(left_out, shown)) == (width < 189)
    for text in ("5.657", "12.34×", "no", "difference", "skipped:", "311.1"):
        assert text in shown, text


def test_a_wide_table_is_whole_where_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    show(report_tables(full_report()), width=230)
    fitting = capsys.readouterr().out
    show(report_tables(full_report()), width=60, wide=True)
    wide = capsys.readouterr().out
    for shown in (fitting, wide):
        assert "--wide" not in shown and "first call s" in shown and "time ÷ subject's" in shown
        assert any("eager bf16" in line and "12.34×" in line and "22.63" in line
                   for line in shown.splitlines())  # fmt: skip


def test_what_is_piped_follows_the_variable_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = report_tables(full_report())
    for columns, width in (("70", 70), ("x", None), ("0", None), ("", None)):
        monkeypatch.setenv("COLUMNS", columns)
        assert output_width() == width
        show(tables)
        longest = max(map(len, capsys.readouterr().out.splitlines()))
        assert (longest <= 70) == (width == 70)
    monkeypatch.setenv("COLUMNS", "30")
    text = "lean bf16 ÷ diffusers bf16: 0.512, at most 0.50: miss"
    assert fold(text) == "lean bf16 ÷ diffusers bf16:\n    0.512, at most 0.50: miss"
    monkeypatch.delenv("COLUMNS")
    assert fold(text) == text
