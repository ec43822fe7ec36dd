"""One module as one ONNX graph, by torch's exporter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dit_export.bundle import ExportFailed, TensorSpec
from dit_export.onnx.naming import make_readable


def to_onnx(
    module: nn.Module,
    name: str,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    opset: int,
) -> Any:
    """``module`` as an onnx_ir Model of standard operators of ``opset``, with readable names.

    Every dimension that has a name in inputs and outputs is dynamic.

    Raises ExportFailed where torch wrote another opset or fixed a dimension: it does either with
    no more than a log.
    """
    example = tuple(random_input(spec, torch.Generator().manual_seed(0)) for spec in inputs)
    symbols: dict[str, Any] = {}
    dynamic = tuple(
        {
            i: symbols.setdefault(size, torch.export.Dim(size))
            for i, size in enumerate(spec.shape)
            if isinstance(size, str)
        }
        for spec in inputs
    )
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
            dynamic_shapes=dynamic,
        )
    assert program is not None
    model = program.model
    if dict(model.opset_imports) != {"": opset} or model.functions:
        raise ExportFailed(
            f"{name}: opset {opset} was asked for, torch wrote {dict(model.opset_imports)}"
        )
    for value, spec in zip(
        (*model.graph.inputs, *model.graph.outputs), (*inputs, *outputs), strict=True
    ):
        shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape or ())
        if (value.name, shape) != (spec.name, spec.shape):
            raise ExportFailed(f"{name}: {value.name} {shape}, where {spec} was meant")
    make_readable(model)
    return model


def random_input(spec: TensorSpec, generator: torch.Generator, **sizes: int) -> Tensor:
    """A tensor for ``spec``; dynamic sizes are those given, else small and all different."""
    sizes = {"batch": 2, "height": 6, "width": 5} | sizes
    shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
    if spec.dtype == "int64":
        return torch.randint(0, 2, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes about packages and interfaces that are not used here."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
