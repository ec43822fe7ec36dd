"""Checkpoints: any source of a model → its config and official state dict → the module, and back.

``load`` reads a source in this order: ``hub`` finds its files on this machine, ``weights`` reads
them (``pickles`` and ``archives`` check them first), ``wrappers`` finds the state dict in what they
hold, and ``convert`` gives diffusers' tensors the official names. The config comes from a
config.json, or ``infer`` reads it from the tensors and from the ``options`` of the training;
``scheduler`` reads a pipeline's diffusion. ``vae`` does all this for the autoencoder. ``save``
writes native directories.
"""

from dit_engine.checkpoint.load import (
    Checkpoint,
    build_model,
    build_vae,
    load_checkpoint,
    load_model,
)
from dit_engine.checkpoint.save import save_pretrained

__all__ = [
    "Checkpoint",
    "build_model",
    "build_vae",
    "load_checkpoint",
    "load_model",
    "save_pretrained",
]
