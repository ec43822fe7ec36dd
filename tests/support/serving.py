"""What the tests of Triton Inference Server know of the one that runs for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dit_engine.engine import Engine
from dit_export.server.process import Running

MAX_BATCH_SIZE = 8


@dataclass(frozen=True)
class Served:
    """engine: has the model that the server has; guided as its graph guides."""

    repository: Path
    running: Running
    engine: Engine
