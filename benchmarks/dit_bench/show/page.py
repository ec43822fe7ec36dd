"""One self-contained HTML file of a report: tables, figures, sheets of samples side by side."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dit_bench.load import warning
from dit_bench.show.drawing import svg
from dit_bench.show.plots import CAPTIONS
from dit_bench.show.reports import report_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1560px; margin: 2rem auto; padding: 0 1rem;
       color: #1b1b1b; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
.scroll { overflow-x: auto; background: /* a shadow where more lies to the right */
          linear-gradient(to left, #fff 30%, #fff0) right / 3rem 100% no-repeat local,
          linear-gradient(to left, #0004, #0000) right / 1rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .45rem; text-align: left; border-bottom: 1px solid #e3e3e3;
         vertical-align: top; }
th { border-bottom: 2px solid #999; vertical-align: bottom; }
.number { text-align: right; } td.number { white-space: nowrap; }
.note { color: #555; font-size: .85rem; margin: .3rem 0; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; height: auto; }
.sheets { display: flex; flex-wrap: wrap; gap: 1.5rem; }
.sheets figure { margin: 0; flex: 1 1 420px; max-width: 600px; }
.sheets img { width: 100%; image-rendering: auto; border: 1px solid #ddd; }
figcaption { color: #555; font-size: .85rem; }
.warning, .wrong { background: #fff3cd; padding: .5rem 1rem; border-left: 4px solid #d39e00; }
.wrong { background: #fde0e0; border-color: #c62828; color: #8e0000; font-weight: 600; }
"""


def page(
    report: dict[str, Any],
    figures: Mapping[str, Figure],
    sheets: Sequence[tuple[str, Image.Image]] = (),
) -> str:
    """HTML without scripts and without anything that would have to be fetched.

    sheets: captions and pictures.
    """
    settings = report["settings"]
    models = ", ".join(model["model"] for model in report.get("models", []))
    what = " ".join(settings[key] for key in ("backend", "precision") if key in settings)
    title = f"DiT {models}: {what}"
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p class=note>{_about(report)}</p>"]
    parts += [f"<p class=wrong>{html.escape(text)}</p>" for text in wrong_subjects(report)]
    if (busy := warning(report)) is not None:
        parts.append(f"<p class=warning>{html.escape(busy)}</p>")
    if not report["complete"]:
        parts.append("<p class=warning>This run was interrupted: what is missing was not "
                     "measured.</p>")  # fmt: skip
    if any(row.get("noisy") for row in report["rows"]):
        parts.append("<p class=warning>Some of these times are noise: they spread by more than "
                     f"{settings['noise_bound']:.0%} of their median.</p>")  # fmt: skip
    tables = report_tables(report)
    parts += [table.html() for table in tables]
    if figures:
        parts.append("<h2>Figures</h2>")
        parts += [
            _figure(_uri("image/svg+xml", svg(figure)), CAPTIONS[name], name.replace("-", " "))
            for name, figure in figures.items()
        ]
    if sheets:
        pictures = "".join(_figure(_png_uri(image), caption) for caption, image in sheets)
        parts.append(f"<h2>Samples, noise being equal</h2>\n<div class=sheets>{pictures}</div>")
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def wrong_subjects(report: dict[str, Any]) -> list[str]:
    """A line for each measurement that was to be made, and whose result is another function's."""
    return [
        f"WRONG: {row['case']}, {row['section']}: {row['contender']} {row['reason']}"
        for row in report["rows"]
        if row.get("role") == "subject" and row["status"] == "wrong"
    ]


def _about(report: dict[str, Any]) -> str:
    command = " ".join(["dit-bench", *map(str, report["command"])])
    return f"{html.escape(report['created'])} · <code>{html.escape(command)}</code>"


def _figure(uri: str, caption: str, name: str | None = None) -> str:
    text, alt = html.escape(caption), html.escape(name or caption)
    return f'<figure><img src="{uri}" alt="{alt}"><figcaption>{text}</figcaption></figure>\n'


def _png_uri(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return _uri("image/png", out.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
