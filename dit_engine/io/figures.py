"""Show names from others in figures of Matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dit_engine.io.printable import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def show_plainly(figure: Figure) -> Figure:
    """Show every text in ``figure`` literally and `printable`, except the numbers at its axes.

    Matplotlib reads text between two "$" as a formula, and raises if it cannot be parsed. Call this
    when the figure is complete, before it is laid out or drawn. Returns ``figure``.
    """
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatter

    numbers = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        if isinstance(axis.get_major_formatter(), LogFormatter)  # it writes 10² as a formula
        for label in axis.get_ticklabels(which="both")
    }
    for text in figure.findobj(Text):
        if isinstance(text, Text) and text not in numbers:
            text.set_parse_math(False)
            text.set_text("\n".join(map(printable, text.get_text().split("\n"))))
    return figure
