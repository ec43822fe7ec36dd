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

    Raises ValueError or OSError, one line naming the file, for what is no such file.
    """
    if path is None:
        return None
    readers = {".npy": _read_npy, ".safetensors": _read_safetensors}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: use a .npy or a .safetensors file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; a file is needed")
    return readers[path.suffix.lower()](path)


def _read_npy(path: Path) -> Tensor:
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
    tensor = next(iter(tensors.values()))
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{path} holds {tensor.dtype}; real numbers are needed")
    return tensor.float()
