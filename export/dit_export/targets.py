"""What an export may hold: graphs, number formats, and the operator sets (opsets) of a runtime."""

from __future__ import annotations

import torch

from dit_engine.arguments import choice

TRANSFORMER_GRAPHS = ("transformer", "guided_step", "conditioner", "denoiser")
QUANTIZED_GRAPHS = ("transformer", "guided_step", "denoiser")
"""The graphs with linear layers over tokens, which are what int8 and fp8 quantise."""
VAE_GRAPH = "vae_decoder"
GRAPHS = (*TRANSFORMER_GRAPHS, VAE_GRAPH)

TARGETS = ("onnxruntime", "tensorrt", "openvino")
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
QUANTIZED = ("int8", "fp8")
DTYPES = (*FLOATS, *QUANTIZED)

# bfloat16 convolutions came with 22, half-precision scales of QuantizeLinear with 19, and 18 is
# where torch's exporter starts.
_LOWEST = {"fp32": 18, "fp16": 18, "bf16": 22, "int8": 19, "fp8": 19}
# The first opset with an Attention operator, and the last that torch's exporter writes: beyond it,
# it falls back to 18 and only logs that.
_BEST, _HIGHEST = 23, 25


def float_dtype(dtype: str, target: str) -> str:
    """The floating-point format of a graph: ``dtype`` or, for int8 and fp8, the one around them.

    TensorRT is quickest with float16 there. onnxruntime's integer products on the CPU read and
    write only float32.
    """
    if dtype not in QUANTIZED:
        return dtype
    return "fp16" if target == "tensorrt" else "fp32"


def choose_opset(dtype: str, target: str, opset: int | None = None) -> int:
    """``opset`` if it can be written and read; None gives the best one.

    Raises ValueError, which names the allowed range.
    """
    choice("dtype", dtype, DTYPES)
    choice("target", target, TARGETS)
    lowest, highest = _LOWEST[dtype], _HIGHEST
    if target == "tensorrt" and float_dtype(dtype, target) == "fp32":
        highest = 20  # TensorRT has no float32 kernel for the Attention operator
    if opset is None:
        return min(highest, _BEST)
    if not lowest <= opset <= highest:
        raise ValueError(
            f"opset {opset} for {dtype} and {target}: allowed is {lowest} to {highest}"
        )
    return opset
