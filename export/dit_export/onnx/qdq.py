"""int8 and fp8 (E4M3) as QuantizeLinear/DequantizeLinear pairs around the blocks' linear layers.

Symmetric: weights with a scale for each output channel, activations with one a tensor. The form is
what TensorRT's strongly typed mode takes its precisions from, and what onnxruntime fuses into
integer products. `QuantizedLinear` is the same arithmetic in torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dit_export.bundle import ExportFailed
from dit_export.onnx.graphs import LINEARS

LIMITS = {"int8": 127.0, "fp8": 448.0}


class QuantizedLinear(nn.Module):
    """A linear layer that rounds its weight and its input as the graph does, in float32."""

    def __init__(self, linear: nn.Linear, kind: str, reach: float, scales: torch.dtype) -> None:
        super().__init__()
        self.kind = kind
        self.scale = scale_of(torch.tensor(reach, dtype=torch.float32), kind, scales).item()
        codes, scale = quantized_weight(linear.weight.detach().t().float(), kind, scales)
        self.weight = nn.Parameter(codes.float() * scale.float(), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, in) → (N, T, out)
        x = rounded(x / self.scale, self.kind).float() * self.scale
        return torch.matmul(x, self.weight) + self.bias


def scale_of(reach: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The scale of what reaches so far, as it is stored: no float16 below its normal numbers."""
    return (reach / LIMITS[kind]).clamp(min=torch.finfo(torch.float16).tiny).to(dtype)


def rounded(x: Tensor, kind: str) -> Tensor:
    """x in units of its scale → codes, int8 or float8_e4m3fn, the outliers clipped."""
    x = x.clamp(-LIMITS[kind], LIMITS[kind])
    return x.round().to(torch.int8) if kind == "int8" else x.to(torch.float8_e4m3fn)


def quantized_weight(weight: Tensor, kind: str, scales: torch.dtype) -> tuple[Tensor, Tensor]:
    """weight (in, out) float32 → codes of the same shape, scales (out,)."""
    scale = scale_of(weight.abs().amax(0), kind, scales)  # (out,)
    return rounded(weight / scale.float(), kind), scale


def quantize(
    model: Any, kind: str, ranges: dict[str, float], scales: torch.dtype, unsigned: bool
) -> None:
    """Put the pairs into an onnx_ir Model of `dit_export.onnx.exporter`, in place.

    Args:
        ranges: of `calibrate`, by layer.
        scales: float dtype of the graph, which Quantize- and DequantizeLinear share with it.
        unsigned: int8 activations as uint8 around 128: the same values, which x86 multiplies by
            int8 weights in one instruction. TensorRT wants them signed, around 0.

    Raises ExportFailed unless every layer of ``ranges``, four a block, is one product of the graph.
    """
    build = _Builder(model, kind, scales, unsigned)
    layers: list[str] = []
    for node in list(model.graph):
        layer = (node.name or "").rpartition("/")[0]
        if node.op_type == "MatMul" and layer in ranges:
            weight: Any = node.inputs[1]
            node.replace_input_with(0, build.activation(node, layer, ranges[layer]))
            node.replace_input_with(1, build.weight(node, layer, weight))
            if not list(weight.uses()):
                del model.graph.initializers[weight.name]
            layers.append(layer)
    if sorted(layers) != sorted(ranges):
        missing = sorted(set(ranges) - set(layers))
        raise ExportFailed(
            f"{model.graph.name}: {len(layers)} linear layers were found to quantise, where the "
            f"{len(ranges) // len(LINEARS)} blocks have {len(ranges)}"
            + (f"; {missing[0]} is not among them" if missing else "")
        )


class _Builder:
    def __init__(self, model: Any, kind: str, scales: torch.dtype, unsigned: bool) -> None:
        self.ir = import_module("onnx_ir")
        self.model, self.kind, self.scales = model, kind, scales
        self.offset = 128 if unsigned and kind == "int8" else 0

    def activation(self, node: Any, layer: str, reach: float) -> Any:
        source = node.inputs[0]
        scale = self._constant(
            f"{layer}.input_scale",
            scale_of(torch.tensor(reach, dtype=torch.float32), self.kind, self.scales),
        )
        zero = torch.tensor(self.offset, dtype=torch.uint8 if self.offset else _CODES[self.kind])
        zero_point = self._constant(f"{layer}.input_zero_point", zero)
        codes = self._node(node, layer, "QuantizeLinear", [source, scale, zero_point], {})
        codes.shape, codes.dtype = source.shape, zero_point.dtype
        values = self._node(node, layer, "DequantizeLinear", [codes, scale, zero_point], {})
        values.shape, values.dtype = source.shape, source.dtype
        return values

    def weight(self, node: Any, layer: str, weight: Any) -> Any:
        full = torch.from_numpy(np.ascontiguousarray(weight.const_value.numpy(), np.float32))
        codes, scale = quantized_weight(full, self.kind, self.scales)
        inputs = [
            self._constant(f"{layer}.weight_codes", codes),
            self._constant(f"{layer}.weight_scale", scale),
            self._constant(
                f"{layer}.weight_zero_point", torch.zeros(len(scale), dtype=codes.dtype)
            ),
        ]
        values = self._node(node, f"{layer}.weight", "DequantizeLinear", inputs, {"axis": 1})
        values.shape, values.dtype = weight.shape, weight.dtype
        return values

    def _constant(self, name: str, tensor: Tensor) -> Any:
        ir = self.ir
        array = tensor.view(torch.uint8).numpy() if tensor.dtype in _BYTES else tensor.numpy()
        if tensor.dtype in _BYTES:
            array = array.view(ir.DataType.FLOAT8E4M3FN.numpy()).reshape(tensor.shape)
        value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
        value.shape, value.dtype = value.const_value.shape, value.const_value.dtype
        self.model.graph.initializers[name] = value
        return value

    def _node(
        self, before: Any, layer: str, kind: str, inputs: list[Any], attributes: dict[str, int]
    ) -> Any:
        name = f"{layer}/{kind}"
        made = self.ir.node(kind, inputs, attributes or None, name=name)
        made.outputs[0].name = name
        before.prepend(made)
        return made.outputs[0]


_CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_BYTES = (torch.float8_e4m3fn,)
