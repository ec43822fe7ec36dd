"""What `python -m` of a module of ours does before that module imports anything else."""

import os
import sys


def installed_first() -> None:
    """Look for modules in the current directory, where python -m begins to look, last of all.

    `dit_engine.cli.start.prepare` leaves the directory out altogether, unless we lie there.
    """
    if sys.path[0] == os.getcwd():  # noqa: PTH109 (as python -m wrote it)
        sys.path.append(sys.path.pop(0))
