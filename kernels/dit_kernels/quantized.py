"""Quantised matrix products, and what feeds them: int8 on the CPU, fp8 on CUDA.

int8 is our own product where that beats oneDNN (`dit_kernels.cpu.product`), else oneDNN's. Weights
have one scale per output channel, activations one scale per row; both are symmetric. Letters: R
rows, K inputs, M outputs, N images, T tokens, D width.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_kernels import checks, reference
from dit_kernels.checks import Unavailable
from dit_kernels.cpu import operators as native
from dit_kernels.cpu import product as native_product
from dit_kernels.dispatch import launcher
from dit_kernels.linear import gelu_

FP8 = torch.float8_e4m3fn
OLDEST_WITH_FP8 = (9, 0)  # for products with one scale per row
CODES = {"int8": (torch.int8, torch.uint8), "fp8": (FP8,)}
# torch's fp8 product adds no bias to float32 results, and only some of its libraries give float16.
RESULTS = {"int8": (torch.float32, torch.bfloat16), "fp8": (torch.bfloat16,)}
FP8_MULTIPLE = 16  # the numbers of inputs and outputs of an fp8 product are multiples of it
FAST_ACCUMULATION = False
"""Whether the sums of an fp8 product stay in the tensor cores, which on Hopper keep about 14 bits
(DeepSeek-V3, arXiv 2412.19437, section 3.3.2), or are added up in float32 every few steps."""

Codes = tuple[Tensor, Tensor]  # codes (…, K) and float32 scales (…)


class QuantizedLinear:
    """A linear layer in int8 (CPUs with VNNI or AMX) or fp8 (Hopper and later).

    Args:
        weight: (M, K), which is quantised here; bias: (M,).
        kind: "int8" on the CPU, "fp8" on CUDA.
        dtype: the results' dtype: float32 or bfloat16, for "fp8" only bfloat16.

    Raises:
        ValueError: an unknown kind, or a dtype or a shape that it does not have.
        Unavailable: a kind that this device does not have.
    """

    def __init__(self, weight: Tensor, bias: Tensor, kind: str, dtype: torch.dtype) -> None:
        checks.check_linear(weight.new_empty(0, weight.shape[1]), weight, bias)
        if kind not in CODES:
            raise ValueError(f"kind {kind!r}: choose one of {', '.join(CODES)}")
        if (reason := quantized_why_not(kind, weight.device)) is not None:
            raise Unavailable(reason)
        if dtype not in RESULTS[kind]:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in RESULTS[kind])
            raise ValueError(f"dtype {dtype}: results of {kind!r} are {allowed}")
        if kind == "fp8" and any(size % FP8_MULTIPLE for size in weight.shape):
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}; 'fp8' needs multiples of {FP8_MULTIPLE}"
            )
        self.kind, self.dtype, self.device = kind, dtype, weight.device
        self.out_features, self.in_features = weight.shape
        self.bias = bias.to(dtype, copy=True)
        # The libraries assume without a check that a weight's rows lie one after another.
        whole = weight.contiguous()
        codes, self.scale = reference.quantize_rows(whole, torch.int8 if kind == "int8" else FP8)
        self.native = kind == "int8" and native_product.why_not(torch.int8) is None
        if self.native:
            self.weight, self.bias = native_product.pack(codes), bias.float()
        elif kind == "int8":
            self.weight = torch.ops.onednn.qlinear_prepack(codes, [1, self.in_features])
            self.zero = torch.zeros(self.out_features, dtype=torch.int32, device="cpu")
        else:
            self.weight = codes  # (M, K); its transpose is the column-major operand

    def __call__(
        self, codes: Tensor, scales: Tensor, gelu: bool = False, out: Tensor | None = None
    ) -> Tensor:
        """Codes (…, K) and float32 scales (…) of R rows in all → (R, M) of ``dtype``, with
        tanh-GELU if asked for.

        Codes and scales are what `layernorm_modulate_quantize` or a `Quantizer` gave: codes of
        float8_e4m3fn, or int8, which may come as uint8 with 128 added.

        out: contiguous memory for the result. It costs a copy unless the product is our own.
        """
        rows = codes.shape[:-1]
        allowed = CODES[self.kind]
        checks.check("codes", codes, (*rows, self.in_features), allowed, self.device, layout=None)
        checks.check("scales", scales, rows, checks.FLOAT, self.device, layout=None)
        codes = codes.reshape(-1, self.in_features).contiguous()
        scales = scales.reshape(-1).contiguous()
        if self.native:
            return native_product.linear_int8(
                _unsigned(codes), scales, self.weight, self.scale, self.bias, self.dtype, gelu, out
            )
        if self.kind == "fp8":
            made = torch.ops.aten._scaled_mm(
                codes, self.weight.t(), scales[:, None], self.scale[None], self.bias,
                out_dtype=self.dtype, use_fast_accum=FAST_ACCUMULATION,
            )  # fmt: skip
            made = gelu_(made) if gelu else made
        else:
            made = torch.ops.onednn.qlinear_pointwise(
                _unsigned(codes), 1.0, 128, self.weight, self.scale, self.zero, None, 1.0, 0,
                self.dtype, "none", [], "",
            )  # fmt: skip
            made = dequantize_rows_(made, scales, self.bias, gelu)
        return made if out is None else out.copy_(made)


def _unsigned(codes: Tensor) -> Tensor:
    """int8 codes with 128 added."""
    return codes if codes.dtype == torch.uint8 else codes.view(torch.uint8) ^ 0x80


class Quantizer:
    """Makes the codes that `QuantizedLinear` takes; ``out`` is memory for the codes and scales.

    int8 codes come as uint8 with 128 added, because oneDNN multiplies unsigned by signed bytes.

    Args:
        kind: "int8" or "fp8".
    """

    def __init__(self, kind: str, device: torch.device) -> None:
        self._dtype = FP8 if kind == "fp8" else torch.uint8
        self._rows = launcher("quantize_rows", device)
        self._gelu_rows = launcher("gelu_quantize_rows", device)
        self._norm = launcher("layernorm_modulate_quantize", device)
        self._gated_norm = launcher("gate_residual_layernorm_modulate_quantize", device)

    def rows(self, x: Tensor, *, out: Codes | None = None) -> Codes:
        """x (…, K) → codes (…, K) and float32 scales (…)."""
        return self._rows(x, self._dtype, out=out)

    def gelu_rows(self, x: Tensor, *, out: Codes | None = None) -> Codes:
        """As `rows`, of the tanh-GELU of x (…, K), which is not rounded before it is quantised."""
        return self._gelu_rows(x, self._dtype, out=out)

    def norm(
        self, x: Tensor, shift: Tensor, scale: Tensor, eps: float, *, out: Codes | None = None
    ) -> Codes:
        """The codes of `operators.layernorm_modulate`'s unrounded result."""
        return self._norm(x, shift, scale, eps, self._dtype, out=out)

    def gated_norm(
        self, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float,
        *, out: Codes | None = None,
    ) -> Codes:  # fmt: skip
        """x += gate · y in place, then the codes of the modulated norm of x.

        x and y are (N, T, D); gate, shift and scale are (N, D); the results are codes (N, T, D) and
        float32 scales (N, T).
        """
        if out is None:
            scales = y.new_empty(y.shape[:-1], dtype=torch.float32)
            out = y.new_empty(y.shape, dtype=self._dtype), scales
        self._gated_norm(x, y, gate, shift, scale, eps, self._dtype, out=(x, *out))
        return out


def dequantize_rows_(x: Tensor, scales: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    """x (R, M) · scales (R,) + bias (M,), with tanh-GELU if asked for, in place."""
    if not torch.compiler.is_compiling() and native.why_not() is None:
        return native.dequantize_rows(x, scales, bias, gelu, out=x)
    wide = x.float() * scales[:, None] + bias.float()
    return x.copy_(F.gelu(wide, approximate="tanh") if gelu else wide)


def quantized_why_not(kind: str, device: torch.device) -> str | None:
    """Why products of this kind cannot run on ``device``, or None."""
    if kind == "int8":
        if device.type != "cpu":
            return f"int8 products are for the CPU, not for {device}; 'fp8' is for Hopper and later"
        if native_product.why_not(torch.int8) is None or _onednn_is_exact():
            return None
        return "int8 products need oneDNN on a processor with VNNI or AMX: elsewhere sums saturate"
    if device.type != "cuda":
        return f"fp8 products are for CUDA, not for {device}; 'int8' is for the CPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_WITH_FP8:
        found, oldest = (".".join(map(str, each)) for each in (capability, OLDEST_WITH_FP8))
        return f"{device} has compute capability {found}, and fp8 products need {oldest} (Hopper)"
    return None


@functools.cache
def _onednn_is_exact() -> bool:
    """Whether there is oneDNN and its unsigned-by-signed product is exact: without VNNI it adds
    pairs of products in 16 bits, which overflow for the largest codes."""
    k = 64
    one = torch.ones(1, dtype=torch.int32, device="cpu")
    largest = torch.full((1, k), 127, dtype=torch.int8, device="cpu")
    try:
        out = torch.ops.onednn.qlinear_pointwise(
            largest.view(torch.uint8) ^ 0x80, 1.0, 128,
            torch.ops.onednn.qlinear_prepack(largest, [1, k]), one.float(), 0 * one,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
    except (AttributeError, RuntimeError):
        return False
    return float(out) == k * 127**2
