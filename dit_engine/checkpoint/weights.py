"""Read files of tensors without running code from them, and put the tensors into modules."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dit_engine.arguments import shown
from dit_engine.checkpoint.archives import check_file
from dit_engine.io.formats import PYTORCH, SAFETENSORS, check_format, format_of
from dit_engine.io.json_files import is_file_name, read_json
from dit_engine.io.printable import first_line, some_of

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# In the header of a safetensors file a tensor takes about 100 bytes, but in memory 1,000.
MOST_HEADER_BYTES = 4 * 2**20
# Tied weights have one storage, but backends copy each of them. So tensors may claim at most
# MOST_TIED times the bytes of their storages, plus the slack.
MOST_TIED, TIED_SLACK_BYTES = 4, 64 * 2**20


def read_weights(path: Path) -> dict[Any, Any]:
    """What a ``.pt``, ``.bin`` or ``.safetensors`` file or a shard index holds, unchanged.

    Tensors are mapped from the file and take memory when they are first used. Pickles are read with
    ``weights_only``: beside tensors they may hold plain containers, numbers, strings and the
    ``argparse.Namespace`` of a training's options. Raises ValueError for any other file.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        # Imported here, because a model that does not come from a file needs no such package.
        import safetensors
        import safetensors.torch

        check_header(path)
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: damaged safetensors file ({first_line(error)})") from None
    if path.suffix in SUFFIXES:
        content = read_pickle(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path}: holds a {type(content).__name__}, not a state dict")
        return content
    found = format_of(path)
    raise ValueError(
        f"{path}: suffix {path.suffix!r} is not one of {', '.join(SUFFIXES)}"
        + (f"; it is {found}" if found else "")
    )


def check_tensors(state: Mapping[Any, Any], source: object) -> dict[str, Tensor]:
    """``state`` without gradients. Raises ValueError for all but named tensors of real numbers, and
    for tensors that claim more memory than is stored, such as expanded ones."""
    claimed, held = 0, {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{source}: {name!r} is a {type(tensor).__name__}, not a named tensor")
        if tensor.dtype not in DTYPES:
            known = ", ".join(map(str, DTYPES))
            raise ValueError(f"{source}: tensor {name!r} is {tensor.dtype}; {known} are known")
        storage = tensor.untyped_storage()
        has = storage.nbytes()
        if tensor.nbytes > has + TIED_SLACK_BYTES:
            raise ValueError(
                f"{source}: tensor {name!r} of shape {tuple(tensor.shape)} claims {tensor.nbytes} "
                f"bytes, but {has} are stored; save it after contiguous()"
            )
        claimed += tensor.nbytes
        held[storage.data_ptr()] = max(has, held.get(storage.data_ptr(), 0))
    if claimed > MOST_TIED * sum(held.values()) + TIED_SLACK_BYTES:
        raise ValueError(
            f"{source}: its tensors share their memory, {sum(held.values())} bytes for {claimed}; "
            "save a copy of each, made with clone()"
        )
    return {name: tensor.detach() for name, tensor in state.items()}


def check_header(path: Path) -> None:
    """Raise ValueError if it is not a safetensors file, or if its header is absurdly long."""
    check_format(path, SAFETENSORS)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if MOST_HEADER_BYTES < length < path.stat().st_size:
        raise ValueError(
            f"{path}: refused, its header has {length} bytes; {MOST_HEADER_BYTES} are allowed"
        )


def read_pickle(path: Path) -> Any:
    """What ``torch.save`` wrote to a file of any name. Raises as `read_weights` does."""
    check_format(path, PYTORCH)
    mapped = check_file(path)
    try:
        # A Namespace is attributes and nothing else; the published training script stores one.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what matters raises
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can make the reader raise almost anything
        wanted = re.search(r"GLOBAL\s+(\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and wanted:
            raise ValueError(
                f"{path}: refused, the pickle asks for {wanted[1]!r}; only tensors are loaded"
            ) from None
        # torch's first line advises to load without the guard; another line says what is wrong.
        why = re.search(r"Unsupported .*$", str(error), re.MULTILINE)
        reason = why[0] if why else first_line(error)
        raise ValueError(f"{path}: damaged or not a PyTorch file ({reason})") from None


def _read_shards(index: Path) -> dict[Any, Any]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: holds no weight_map")
    for name in weight_map.values():
        if not is_file_name(name) or name.endswith(".index.json"):
            raise ValueError(f"{index}: shard {shown(name)} is not a file name")
    state: dict[Any, Any] = {}
    for name in sorted(set(weight_map.values())):
        before = len(state)
        state |= read_weights(index.parent / name)
        if len(state) == before:  # thousands of names may be links to one file
            raise ValueError(
                f"{index}: shard {shown(name)} holds no tensors that other shards lack"
            )
    if absent := [key for key in weight_map if key not in state]:
        raise ValueError(f"{index}: the shards lack {some_of(absent)}")
    return state


def check_shapes(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raise ValueError where names or shapes are not those ``expected``, in one line."""
    missing = [key for key in expected if key not in state]
    extra = [key for key in state if key not in expected]
    wrong = [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(shape)}"
        for key, shape in expected.items()
        if key in state and state[key].shape != shape
    ]
    faults = ("keys missing", missing), ("keys too many", extra), ("wrong shapes", wrong)
    if told := [
        f"{len(names)} {fault}: {some_of(names, quote=names is not wrong)}"
        for fault, names in faults
        if names
    ]:
        raise ValueError("; ".join(told))


class _SkipNormal(TorchFunctionMode):
    # Random normal numbers on the meta device go through a Python decomposition, whose import
    # takes a second and 75 MB; nobody would see the numbers.
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.init.normal_:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextmanager
def without_storage() -> Iterator[None]:
    """Parameters that are made inside have a shape and a dtype, but take no memory."""
    with torch.device("meta"), _SkipNormal():
        yield


def load_into(module: nn.Module, path: Path) -> None:
    """Load the weights of ``module`` from a file that holds exactly its tensors; a one-line
    ValueError with the path for any other file."""
    state = check_tensors(read_weights(path), path)
    try:
        check_shapes(state, {name: tensor.shape for name, tensor in module.state_dict().items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    module.load_state_dict(state)
