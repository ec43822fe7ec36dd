"""Native model directories, written whole or not at all.

``config.json`` (ModelConfig and ``"_class_name": "DiT"``), ``model.safetensors``, and optionally
``labels.json`` (one name per class) and ``vae/`` in diffusers' format.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dit_engine.io.directories import new_directory, nothing_known
from dit_engine.io.files import save_tensors
from dit_engine.io.formats import SAFETENSORS, format_of
from dit_engine.io.json_files import read_json_value
from dit_engine.model import DiT
from dit_engine.runtime import neutral
from dit_engine.vae import AutoencoderKL

NATIVE_CLASS = "DiT"
NATIVE_FILES = ("config.json", "model.safetensors", "labels.json", "vae/config.json",
                "vae/diffusion_pytorch_model.safetensors")  # fmt: skip
MODEL_CARD = "README.md"


@neutral()
def save_pretrained(
    directory: str | Path,
    model: DiT,
    vae: AutoencoderKL | None = None,
    label_names: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a native directory, whole or not at all.

    It replaces an empty directory or an earlier native one, and keeps its README.md. If writing
    is interrupted, the earlier directory stays as it was.

    label_names: one for each class. dtype: of all weights in the files; None keeps the modules'
    own. Raises ValueError if the directory holds something else or the names do not fit the
    classes, OSError if it cannot be written.
    """
    target = Path(directory)
    if label_names is not None and len(label_names) != model.config.num_classes:
        raise ValueError(f"{len(label_names)} label names for {model.config.num_classes} classes")
    with new_directory(target, _native_files) as partial:
        values = {"_class_name": NATIVE_CLASS, **model.config.to_dict()}
        (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        _write_tensors(partial / "model.safetensors", model, dtype)
        if label_names is not None:
            text = json.dumps(list(label_names), indent=2, ensure_ascii=False)
            (partial / "labels.json").write_text(text + "\n", encoding="utf-8")
        if vae is not None:
            (partial / "vae").mkdir()
            (partial / "vae" / "config.json").write_text(vae.config.to_json())
            _write_tensors(partial / "vae" / "diffusion_pytorch_model.safetensors", vae, dtype)
        if (target / MODEL_CARD).is_file():
            shutil.copy2(target / MODEL_CARD, partial / MODEL_CARD)


def _native_files(directory: Path) -> Mapping[str, None]:
    """A `Known`: the files of an earlier native directory. Their hashes are not stored anywhere, so
    each file must instead have the format that belongs to its name."""
    config = directory / "config.json"
    if not config.is_file() or not _is_native(config):
        return nothing_known(directory)
    for name in NATIVE_FILES:
        path = directory / name
        if path.is_file() and not path.is_symlink() and not _is_native(path):
            raise ValueError(f"its {name} was not written by save_pretrained: move it elsewhere")
    return dict.fromkeys((*NATIVE_FILES, MODEL_CARD))


def _is_native(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return format_of(path) == SAFETENSORS
    try:
        values = read_json_value(path, lenient=True)
    except ValueError:
        return False
    if path.name == "labels.json":
        return isinstance(values, list) and all(isinstance(name, str) for name in values)
    wanted = "AutoencoderKL" if path.parent.name == "vae" else NATIVE_CLASS
    return isinstance(values, dict) and values.get("_class_name") == wanted


def _write_tensors(path: Path, module: torch.nn.Module, dtype: torch.dtype | None) -> None:
    state = {
        key: tensor.detach().to("cpu", dtype or tensor.dtype)
        for key, tensor in module.state_dict().items()
    }
    save_tensors(state, path, {"format": "pt"})
