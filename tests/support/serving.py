"""The Triton Inference Server that runs for the tests, and the model that it serves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tiny import tiny_dit

from dit_engine.engine import Engine
from dit_engine.model import DiT
from dit_export.server.process import Running

MAX_BATCH_SIZE = 8


@dataclass(frozen=True)
class Served:
    """engine: has the model that the server has; guided as its graph guides."""

    repository: Path
    running: Running
    engine: Engine


def served_model() -> DiT:
    """`tiny_dit` with larger label vectors, so that label and guidance change the image clearly."""
    model = tiny_dit()
    model.y_embedder.embedding_table.weight.data *= 10.0
    return model
