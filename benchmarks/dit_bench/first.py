"""The first step of our modules under `python -m`, before they import anything else."""

import os
import sys


def installed_first() -> None:
    """Move the current directory to the end of ``sys.path``; `python -m` puts it first.

    `dit_engine.cli.start.prepare` removes it later, unless our packages are in it.
    """
    if sys.path[0] == os.getcwd():  # noqa: PTH109 (the same string as Python's)
        sys.path.append(sys.path.pop(0))
