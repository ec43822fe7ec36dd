"""Processes in which tests use Triton.

Whether kernels are interpreted is settled when Triton is first imported, and torch may import it
at any time, so the interpreter and the compiler each get processes of their own. A worker lives
until the test run ends.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

SPAWN = multiprocessing.get_context("spawn")


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test function, with its parameters, in the process of Triton's interpreter."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        require_triton()
        if os.environ.get("TRITON_INTERPRET") == "1":  # this is that process, or all of them are
            _mend_interpreter()
            test(**arguments)
        else:
            name = test.__module__, test.__qualname__
            _interpreter().submit(_call, *name, arguments).result()

    return run


def require_triton() -> None:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("triton is not installed")


@functools.cache
def compilers() -> ProcessPoolExecutor:
    """Processes in which Triton compiles; one where pytest-xdist runs other tests beside it."""
    workers = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(os.cpu_count() or 1, 4)
    return ProcessPoolExecutor(workers, SPAWN, initializer=_begin, initargs=("0",))


@functools.cache
def _interpreter() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, SPAWN, initializer=_begin, initargs=("1",))


def _begin(interpret: str) -> None:
    os.environ["TRITON_INTERPRET"] = interpret
    torch.set_num_threads(1)  # small tensors; and the parent's tests want the other cores


def _call(module: str, name: str, arguments: dict[str, Any]) -> None:
    getattr(importlib.import_module(module), name)(**arguments)


@functools.cache
def _mend_interpreter() -> None:
    """Exact conversions and bfloat16 products, which Triton 3.6 and 3.7 get wrong.

    There a conversion to bfloat16 truncates, one to float8 loses the carry of its rounding, and a
    dot multiplies the bits of bfloat16 as integers. Triton 3.6 also takes the bound of a loop from
    an array of one element, which numpy 2.4 refuses.
    """
    from triton.runtime import interpreter

    wrong = interpreter._convert_float
    torch_types = {
        "fp32": torch.float32,
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
        "fp8e4nv": torch.float8_e4m3fn,
    }

    def convert(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source.name not in torch_types or target.name not in torch_types:
            return wrong(values, source, target, rounding)
        tensor = torch.frombuffer(bytearray(values.tobytes()), dtype=torch_types[source.name])
        converted = tensor.to(torch_types[target.name])
        bits = np.dtype(f"uint{target.primitive_bitwidth}")
        return converted.view(torch.uint8).numpy().view(bits).reshape(values.shape)

    def widen(handle: Any) -> np.ndarray:
        if handle.dtype.scalar.name == "bf16":
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data

    def dot(builder: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        product = np.matmul(widen(a), widen(b), dtype=d.data.dtype) + d.data
        return interpreter.TensorHandle(product, d.dtype.scalar)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
