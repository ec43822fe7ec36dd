"""Exports that backends make for themselves, kept between processes."""

from __future__ import annotations

import hashlib
import json
import shutil

import torch

from dit_engine._version import __version__
from dit_engine.caches import private_cache
from dit_engine.files import locked
from dit_engine.model import DiT
from dit_export.bundle import FORMAT, Bundle
from dit_export.onnx import ExportOptions, export_onnx
from dit_export.source import weights_hash


def cached_export(model: DiT, options: ExportOptions) -> Bundle:
    """The export of ``model``, made now or earlier; one that is damaged is made again.

    Its name is a hash of the weights, the config, the options and the versions that wrote it.
    """
    path = private_cache("onnx") / _key(model, options)
    lock = path.with_name(f"{path.name}.lock")
    with locked(lock):
        try:
            return Bundle.open(path)
        except ValueError:
            # Not there, or damaged. Here everything is ours, also what is no export any more.
            for leftover in [path, *path.parent.glob(f".{path.name}.*")]:  # of a killed process
                if leftover.is_dir() and not leftover.is_symlink():
                    shutil.rmtree(leftover)
        return export_onnx(model, path, options, overwrite=True)


def _key(model: DiT, options: ExportOptions) -> str:
    facts = {
        "weights": weights_hash(model),
        "config": model.config.to_dict(),
        "options": repr(options),
        "versions": [FORMAT, __version__, torch.__version__],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
