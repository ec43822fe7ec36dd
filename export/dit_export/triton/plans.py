"""TensorRT engines that a server's "tensorrt_plan" can load."""

from __future__ import annotations

from pathlib import Path

from dit_export.bundle import Bundle


def find_plan(directory: Path, bundle: Bundle, graph: str, max_batch_size: int) -> Path:
    """The newest engine of ``graph`` in ``directory`` that takes 1 to ``max_batch_size`` rows.

    Raises ValueError where there is none, naming what the engines that are there are for.
    """
    from dit_export.engine_files import find_engines

    checkpoint = bundle.vae_checkpoint if graph == "vae_decoder" else bundle.checkpoint
    engines = find_engines(directory, graph, checkpoint)
    standard = [engine for engine in engines if engine.key.flavour == "tensorrt"]
    if not standard:
        raise ValueError(
            f"{directory}: its engine of {graph} is for {engines[0].key.flavour}; the server loads "
            "those of standard TensorRT"
        )
    for engine in standard:
        batches = [profile.batch for profile in engine.key.profiles]
        if any(batch.smallest == 1 and max_batch_size <= batch.largest for batch in batches):
            return engine.path
    first = standard[0]
    raise ValueError(
        f"{first.path}: its profile takes batches of {first.key.profiles[0].batch}; "
        f"1 to {max_batch_size} are needed"
    )
