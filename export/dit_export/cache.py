"""Keep the exports that backends make, for later processes."""

from __future__ import annotations

import hashlib
import json
import shutil

import torch

from dit_engine._version import __version__
from dit_engine.io.caches import private_cache, why_not_private
from dit_engine.io.files import locked
from dit_engine.model import DiT
from dit_export.bundle import FORMAT, Bundle
from dit_export.onnx.export import ExportOptions, export_onnx
from dit_export.onnx.files import check_metadata
from dit_export.source import weights_hash


def cached_export(model: DiT, options: ExportOptions) -> Bundle:
    """The export of ``model``, from the cache or made now.

    The name in the cache is a hash of the weights, the config, the options and the versions that
    wrote it. An export is made again if it is damaged, is of another model, or is in a directory
    that others may write in.

    Raises as `private_cache` and `export_onnx` do.
    """
    weights = weights_hash(model)
    path = private_cache("onnx") / _key(model, options, weights)
    with locked(path.with_name(f"{path.name}.lock")):
        try:
            bundle = Bundle.open(path)
            claimed = (bundle.checkpoint, bundle.config, bundle.dtype, bundle.target)
            if claimed != (weights, model.config, options.dtype, options.target):
                raise ValueError(f"{path}: an export of another model, or with other options")
            if (reason := why_not_private(path)) is not None:
                raise ValueError(f"{path}: {reason}")
            for graph in options.graphs or bundle.graphs:
                check_metadata(bundle, graph)
            return bundle
        except ValueError:
            # Missing or damaged. The directory is private, so we may remove every file in it.
            for leftover in [path, *path.parent.glob(f".{path.name}.*")]:  # of a killed process
                if leftover.is_dir() and not leftover.is_symlink():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink(missing_ok=True)
        made = export_onnx(model, path, options, overwrite=True)
        path.chmod(0o700)
        return made


def _key(model: DiT, options: ExportOptions, weights: str) -> str:
    versions = [FORMAT, __version__, torch.__version__]
    facts = {"weights": weights, "config": model.config.to_dict(), "options": repr(options)}
    text = json.dumps(facts | {"versions": versions}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
