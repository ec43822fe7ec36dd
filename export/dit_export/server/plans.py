"""TensorRT engines that a server's "tensorrt_plan" can load."""

from __future__ import annotations

from pathlib import Path

from dit_engine.io.files import file_hash
from dit_export.bundle import Bundle
from dit_export.tensorrt.engine_files import EngineFile, find_engines


def find_plan(directory: Path, bundle: Bundle, graph: str, max_batch_size: int) -> EngineFile:
    """The newest engine of ``graph`` in ``directory`` that takes 1 to ``max_batch_size`` rows.

    Raises ValueError where there is none, saying what the engine that is there is for.
    """
    from dit_export.tensorrt.build import graph_hash

    checkpoint = bundle.vae_checkpoint if graph == "vae_decoder" else bundle.checkpoint
    engines = find_engines(directory, graph, checkpoint)
    wanted, reasons = graph_hash(bundle, graph), []
    for engine in engines:
        profile = engine.key.profiles[0]  # which the server takes
        batch = profile.batch
        if engine.key.graph != wanted:
            reasons.append(f"was built from another export than {bundle.path}")
        elif engine.key.flavour != "tensorrt":
            reasons.append(f"is for {engine.key.flavour}; the server loads standard TensorRT's")
        elif engine.key.plugins:
            reasons.append("holds a plugin that the server does not have")
        elif not (batch.smallest == 1 and max_batch_size <= batch.largest):
            reasons.append(f"takes batches of {batch}; 1 to {max_batch_size} are needed")
        elif profile.size is not None and bundle.config.input_size not in profile.size:
            side = bundle.config.input_size
            reasons.append(f"takes latents of size {profile.size}; {side} is needed")
        elif file_hash(engine.path) != engine.sha256:
            reasons.append("has changed since it was built (SHA-256 differs)")
        else:
            return engine
    raise ValueError(f"{engines[0].path}: {reasons[0]}")
