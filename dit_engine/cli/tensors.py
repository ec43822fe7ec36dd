"""Tensors that a user gives as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dit_engine.checkpoint.weights import check_header
from dit_engine.io.arrays import map_npy
from dit_engine.io.formats import NUMPY, check_format


def read_tensor(path: Path | None) -> Tensor | None:
    """The one tensor in a .npy or .safetensors file as float32; None for None.

    Raises a one-line ValueError or OSError that names the file, for any other file.
    """
    if path is None:
        return None
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _read_safetensors(path)
    if suffix != ".npy":
        raise ValueError(f"{path}: use a .npy or a .safetensors file")
    check_format(path, NUMPY)
    array = map_npy(path)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{path} holds {array.dtype}; real numbers are needed")
    return torch.from_numpy(np.array(array, np.float32, order="C"))


def _read_safetensors(path: Path) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_header(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a .safetensors file: {error}") from None
    if len(tensors) != 1:
        raise ValueError(f"{path} holds {len(tensors)} tensors; one is needed")
    (tensor,) = tensors.values()
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{path} holds {tensor.dtype}; real numbers are needed")
    return tensor.float()
