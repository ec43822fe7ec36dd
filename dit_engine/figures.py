"""Figures of Matplotlib, in which names stand that others have given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dit_engine.printable import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def show_plainly(figure: Figure) -> Figure:
    """``figure``, with every text as it is written, but for the numbers at its axes.

    Matplotlib takes what stands between two "$" for a formula, and raises where it is none. To be
    called when all is in the figure, before it is laid out or drawn.
    """
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatter

    numbers = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        if isinstance(axis.get_major_formatter(), LogFormatter)  # they are formulas
        for label in axis.get_ticklabels(which="both")
    }
    for text in figure.findobj(Text):
        if isinstance(text, Text) and text not in numbers:
            text.set_parse_math(False)
            text.set_text("\n".join(map(printable, text.get_text().split("\n"))))
    return figure
