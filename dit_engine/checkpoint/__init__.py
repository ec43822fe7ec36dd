"""Checkpoints: any source of a model → its config and official state dict → the module, and back.

``load`` reads a source in this order: ``hub`` finds it on this machine, ``directory`` knows what
a directory holds, ``weights`` reads the files, ``infer`` takes the config from bare tensors, and
``convert`` gives diffusers' tensors the official names. ``saving`` writes native directories.
"""

from dit_engine.checkpoint.load import (
    Checkpoint,
    build_model,
    build_vae,
    load_checkpoint,
    load_model,
)
from dit_engine.checkpoint.saving import save_pretrained

__all__ = [
    "Checkpoint",
    "build_model",
    "build_vae",
    "load_checkpoint",
    "load_model",
    "save_pretrained",
]
