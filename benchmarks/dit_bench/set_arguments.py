"""The options that say how whole sets of images are compared; light, so that --help is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

NETWORKS = ("inception", "lite0")
RESAMPLES = 100  # of the bootstrap


def add_set_arguments(parser: argparse.ArgumentParser) -> None:
    """What `dit_bench.parity.set_comparison` reads."""
    add = parser.add_argument
    add("--features", choices=NETWORKS,
        help="paired sets: their distance too; lite0 is FD-Lite0, not FID")  # fmt: skip
    add("--reference-set", type=Path, metavar="SET", help="folder or .npz to measure both sets "
        "against, for |ΔFID|; by inception unless --features is given")  # fmt: skip
    add("--inception-weights", type=Path, metavar="FILE",
        help="DIT_INCEPTION_WEIGHTS unless given")  # fmt: skip
    add("--resamples", type=int, default=RESAMPLES, help="of the bootstrap")
    add("--allow-few", action="store_true", help="accept fewer images than features")
