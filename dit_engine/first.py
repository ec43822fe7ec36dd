"""Take the current directory out of ``sys.path``, when `python -m` runs one of our modules.

It imports only what Python itself has loaded already: any other module could come from the current
directory, which is still the first place that is searched.
"""

# pathlib is not loaded yet.
# ruff: noqa: PTH100, PTH109, PTH120
import os
import sys

PACKAGES = ("dit_engine", "dit_kernels", "dit_export", "dit_bench")


def leave_out_of_path() -> None:
    """Take the current directory out of ``sys.path``, unless PYTHONPATH names it.

    An entry behind those of the standard library stays: an installed package put it there. If one
    of our packages is in the directory, as in a checkout, the directory becomes the last entry.
    """
    try:
        here = os.getcwd()  # as Python itself writes it
    except OSError:  # removed
        here = ""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    named = here in [os.path.abspath(place) for place in given if place]
    before, library = list(sys.path), os.path.dirname(os.__file__)
    end = before.index(library) if library in before else len(before)
    sys.path[:] = [
        place
        for number, place in enumerate(before)
        if place and (place != here or named or number > end)
    ]
    if sys.path != before and here not in sys.path and here in _folders():
        sys.path.append(here)


def _folders() -> list[str]:
    files = (getattr(sys.modules.get(name), "__file__", None) for name in PACKAGES)
    return [os.path.dirname(os.path.dirname(os.path.realpath(file))) for file in files if file]
