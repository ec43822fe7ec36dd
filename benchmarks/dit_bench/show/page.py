"""One self-contained HTML file of a report: its tables and figures."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

from dit_bench.load import warning
from dit_bench.report import Report
from dit_bench.show.plots import drawn
from dit_bench.show.reports import interrupted, report_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1560px; margin: 2rem auto; padding: 0 1rem;
       color: #1b1b1b; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .45rem; text-align: left; border-bottom: 1px solid #e3e3e3;
         vertical-align: top; }
th { border-bottom: 2px solid #999; vertical-align: bottom; }
.number { text-align: right; } td.number { white-space: nowrap; }
.note { color: #555; font-size: .85rem; margin: .3rem 0; }
img { max-width: 100%; margin: 1rem 0; }
.warning, .wrong { background: #fff3cd; padding: .5rem 1rem; border-left: 4px solid #d39e00; }
.wrong { background: #fde0e0; border-color: #c62828; color: #8e0000; font-weight: 600; }
"""


def page(report: Report, figures: Mapping[str, Figure]) -> str:
    """HTML without scripts, which fetches nothing."""
    settings = report["settings"]
    models = ", ".join(model["model"] for model in report.get("models", []))
    what = " ".join(settings[key] for key in ("backend", "precision") if key in settings)
    title = escape(": ".join(part for part in (f"DiT {models}".strip(), what) if part))
    command = " ".join(["dit-bench", *map(str, report["command"])])
    body = [
        f"<h1>{title}</h1>",
        f"<p class=note>{escape(report['created'])} · <code>{escape(command)}</code></p>",
    ]
    wrong = [f"WRONG: {row['case']}, {row['section']}: {row['contender']} {row['reason']}"
             for row in report["rows"]
             if row.get("role") == "subject" and row["status"] == "wrong"]  # fmt: skip
    warnings = [text for text in (warning(report), *interrupted(report)) if text]
    if any(row.get("noisy") for row in report["rows"]):
        warnings.append("Some of these times are noisy.")
    body += [f"<p class=wrong>{escape(text)}</p>" for text in wrong]
    body += [f"<p class=warning>{escape(text)}</p>" for text in warnings]
    body += [table.html() for table in report_tables(report)]
    for name, figure in figures.items():
        data = b64encode(drawn(figure, "svg")).decode()
        body.append(f'<p><img src="data:image/svg+xml;base64,{data}" alt="{escape(name)}"></p>')
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )
