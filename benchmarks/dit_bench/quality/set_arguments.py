"""The options that say how whole sets of images are compared; light, so that --help is quick."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

NETWORKS = ("inception", "lite0")
RESAMPLES = 100  # of the bootstrap
LEAST_RESAMPLES = 20  # the 95 % quantiles of fewer are their extremes

SET_OPTIONS = ("features", "reference_set", "inception_weights", "resamples", "allow_few")


def add_set_arguments(parser: argparse.ArgumentParser) -> None:
    """What `dit_bench.quality.parity.set_comparison` reads."""
    add = parser.add_argument
    add("--features", choices=NETWORKS,
        help="paired sets: their distance too; lite0 is FD-Lite0, not FID")  # fmt: skip
    add("--reference-set", type=Path, metavar="SET", help="folder or .npz to measure both sets "
        "against, for |ΔFID|; by inception unless --features is given")  # fmt: skip
    add("--inception-weights", type=Path, metavar="FILE",
        help="DIT_INCEPTION_WEIGHTS unless given")  # fmt: skip
    add("--resamples", type=int, metavar="N",
        help=f"of the bootstrap, at least {LEAST_RESAMPLES}; {RESAMPLES} unless given")  # fmt: skip
    add("--allow-few", action="store_true", help="accept fewer images than features")


def refuse_given(arguments: argparse.Namespace, names: Iterable[str], needed: str) -> None:
    """Raise a ValueError for the first option of ``names`` that was given; it is for ``needed``."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value is not False:
            raise ValueError(f"--{name.replace('_', '-')} is for {needed}, which is not given")
