"""How long the threads of a command wait for each other awake."""

from __future__ import annotations

import os
import sys

SPINS = "10000"
"""Of libgomp's waiting loop: longer than between two operators, shorter than a slice of time of the
system's. Its own choice, 300,000, is milliseconds."""


def wait_briefly() -> None:
    """Let OpenMP's threads sleep soon when they wait, unless the environment says how they wait.

    Where other programs use the processors too, a thread that waits awake may take the time from
    the very one that it waits for; a step then takes many times as long. An idle machine pays a
    little for it: threads that sleep have to be woken. libgomp reads its environment once: this is
    for programs of our own, before they import torch.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "torch" not in sys.modules:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
