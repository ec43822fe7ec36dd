"""One self-contained HTML file of a report: tables, figures, sheets of samples side by side."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dit_bench.drawing import svg
from dit_bench.report import report_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1560px; margin: 2rem auto; padding: 0 1rem;
       color: #1b1b1b; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid #e3e3e3;
         vertical-align: top; }
th { border-bottom: 2px solid #999; } td:not(:last-child), th { white-space: nowrap; }
.number { text-align: right; } td:last-child { max-width: 40rem; }
.note { color: #555; font-size: .85rem; margin: .3rem 0; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; height: auto; }
.sheets { display: flex; flex-wrap: wrap; gap: 1.5rem; }
.sheets figure { margin: 0; flex: 1 1 420px; max-width: 600px; }
.sheets img { width: 100%; image-rendering: auto; border: 1px solid #ddd; }
figcaption { color: #555; font-size: .85rem; }
.warning { background: #fff3cd; padding: .5rem 1rem; border-left: 4px solid #d39e00; }
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
    models = ", ".join(model["model"] for model in report["models"])
    title = f"DiT {models}: {settings['backend']} {settings['precision']}"
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p class=note>{_about(report)}</p>"]
    if report["interrupted"]:
        parts.append("<p class=warning>This run was interrupted: what is missing was not "
                     "measured.</p>")  # fmt: skip
    if any(row.get("noisy") for row in report["measurements"]):
        parts.append("<p class=warning>Some of these times are noise: they spread by more than "
                     f"{settings['noise_bound']:.0%} of their median.</p>")  # fmt: skip
    tables = report_tables(report)
    parts += [table.html() for table in tables]
    if figures:
        parts.append("<h2>Figures</h2>")
        parts += [
            _figure(_uri("image/svg+xml", svg(figure)), name.replace("-", " "))
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


def _about(report: dict[str, Any]) -> str:
    command = " ".join(["dit-bench", *map(str, report["command"])])
    return f"{html.escape(report['created'])} · <code>{html.escape(command)}</code>"


def _figure(uri: str, caption: str) -> str:
    text = html.escape(caption)
    return f'<figure><img src="{uri}" alt="{text}"><figcaption>{text}</figcaption></figure>\n'


def _png_uri(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return _uri("image/png", out.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
