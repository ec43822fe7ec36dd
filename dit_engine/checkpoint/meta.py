"""Modules without storage, to be given a file's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


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
