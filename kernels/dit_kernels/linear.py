"""Matrix products: the library's own, with weights packed once and with their epilogue fused.

On the CPU that is oneDNN with weights in its blocked layout; on CUDA cuBLASLt, whose epilogue adds
the bias and applies the tanh-GELU. Letters: R rows, K inputs, M outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_kernels import checks, native_product, reference
from dit_kernels.choose import Unavailable, implementation, launcher


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, impl: str = "auto") -> Tensor:
    """x (…, K) · weight (M, K)ᵀ + bias (M,) → (…, M), by the library ("auto") or the reference."""
    return _product(x, weight, bias, impl, gelu=False)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, impl: str = "auto") -> Tensor:
    """`linear`, then GELU in its tanh form (Hendrycks & Gimpel 2016)."""
    return _product(x, weight, bias, impl, gelu=True)


def _product(x: Tensor, weight: Tensor, bias: Tensor, impl: str, gelu: bool) -> Tensor:
    checks.check_linear(x, weight, bias)
    if impl == "reference":
        name = "linear_gelu" if gelu else "linear"
        return implementation(name, impl, x.device)(x, weight, bias)
    if impl != "auto":
        raise Unavailable(f"impl {impl!r}: matrix products stay with the library (impl 'auto')")
    rows = x.reshape(-1, x.shape[-1])
    if x.is_cuda and gelu:
        out = torch.ops.aten._addmm_activation(bias, rows, weight.t(), use_gelu=True)  # tanh
    else:
        out = F.linear(rows, weight, bias)
        if gelu:
            out = gelu_(out)
    return out.view(*x.shape[:-1], len(weight))


def gelu_(x: Tensor) -> Tensor:
    """tanh-GELU of a contiguous x, in place where there is a kernel for it."""
    run = implementation("gelu", "auto", x.device)
    if run.__module__.endswith("reference"):
        return F.gelu(x, approximate="tanh")
    return run(x, out=x)


class PackedLinear:
    """A linear layer whose weight is kept in the layout that the product reads, and only there.

    On the CPU that is the layout of our own product where it beats oneDNN's
    (`native_product.why_not`), else oneDNN's.

    Args:
        weight: (M, K) on its device, in the dtype of the product.
        bias: (M,), of the same dtype.
        rows: how many rows x will have, where known: oneDNN's layout may depend on it.
    """

    def __init__(self, weight: Tensor, bias: Tensor, rows: int | None = None) -> None:
        checks.check_linear(weight.new_empty(0, weight.shape[1]), weight, bias)
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.bias = bias.clone()  # no view that would keep a mapped file in memory
        on_cpu = weight.device.type == "cpu"
        self.native = on_cpu and native_product.why_not(weight.dtype) is None
        self.onednn = on_cpu and not self.native and onednn_takes(weight.dtype)
        if self.native:
            self.weight, self.bias = native_product.pack(weight), self.bias.float()
        elif self.onednn:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        else:
            self.weight = weight.contiguous()

    @property
    def rows_are_independent(self) -> bool:
        """Whether a row's bits are the same whatever rows stand beside it."""
        return self.native

    def __call__(self, x: Tensor, gelu: bool = False) -> Tensor:
        """x (…, K) → (…, M), with tanh-GELU if asked for."""
        if x.shape[-1] != self.in_features or x.dtype != self.dtype:
            raise ValueError(
                f"x is {x.dtype} {tuple(x.shape)}; {self.dtype} (…, {self.in_features}) is needed"
            )
        if self.native:
            return native_product.linear(x, self.weight, self.bias, self.out_features, gelu)
        if not self.onednn:
            return (linear_gelu if gelu else linear)(x, self.weight, self.bias)
        out = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        # oneDNN's own post-op is slower than the vectorised kernel on the result in cache.
        return gelu_(out) if gelu else out


def onednn_takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


class QuantizedLinear:
    """A linear layer in int8 (CPU: VNNI or AMX through oneDNN) or fp8 (Hopper and later).

    Weights are quantised symmetrically with one scale an output channel, activations come with one
    scale a row.

    Args:
        weight: (M, K); bias: (M,).
        kind: "int8" on the CPU, "fp8" on CUDA.
        dtype: of the results.

    Raises:
        ValueError: an unknown kind.
        Unavailable: a kind that this device does not have.
    """

    def __init__(self, weight: Tensor, bias: Tensor, kind: str, dtype: torch.dtype) -> None:
        checks.check_linear(weight.new_empty(0, weight.shape[1]), weight, bias)
        if kind not in ("int8", "fp8"):
            raise ValueError(f"kind {kind!r}: choose one of int8, fp8")
        if (reason := quantized_why_not(kind, weight.device)) is not None:
            raise Unavailable(reason)
        self.kind, self.dtype = kind, dtype
        self.out_features, self.in_features = weight.shape
        self.bias = bias.to(dtype, copy=True)
        codes, self.scale = reference.quantize_rows(weight, torch.int8 if kind == "int8" else FP8)
        self.native = kind == "int8" and native_product.why_not(torch.int8) is None
        if self.native:
            self.weight, self.bias = native_product.pack(codes), bias.float()
        elif kind == "int8":
            self.weight = torch.ops.onednn.qlinear_prepack(codes, [1, self.in_features])
            self.zero = torch.zeros(self.out_features, dtype=torch.int32)
        else:
            self.weight = codes  # (M, K); its transpose is the column-major operand

    def __call__(self, codes: Tensor, scales: Tensor, gelu: bool = False) -> Tensor:
        """What `row_quantizer` gave, codes (…, K) and scales (…) of R rows in all → (R, M) of
        ``dtype``, with tanh-GELU if asked for."""
        codes, scales = codes.view(-1, self.in_features), scales.view(-1)
        if self.kind == "fp8":
            out = torch.ops.aten._scaled_mm(
                codes, self.weight.t(), scales[:, None], self.scale[None], self.bias,
                out_dtype=self.dtype,
            )  # fmt: skip
            return gelu_(out) if gelu else out
        if self.native:
            return native_product.linear_int8(
                codes, scales, self.weight, self.scale, self.bias, self.dtype, gelu
            )
        out = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 128, self.weight, self.scale, self.zero, None, 1.0, 0, self.dtype,
            "none", [], "",
        )  # fmt: skip
        return dequantize_rows_(out, scales, self.bias, gelu)


FP8 = torch.float8_e4m3fn


def row_quantizer(kind: str, device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """x (…, K) → codes (…, K) and float32 scales (…), as `QuantizedLinear` of ``kind`` takes them.

    int8 codes come as uint8 with 128 added: oneDNN multiplies unsigned by signed bytes.
    """
    run = launcher("quantize_rows", device)
    if kind == "fp8":
        return lambda x: run(x, FP8)
    if not run.__module__.endswith("native"):
        run = reference.quantize_rows
    return lambda x: run(x, torch.uint8)


def dequantize_rows_(x: Tensor, scales: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    """x (R, M) · scales (R,) + bias (M,), with tanh-GELU if asked for, in place."""
    from dit_kernels import native

    if native.why_not() is None:
        return native.dequantize_rows(x, scales, bias, gelu, out=x)
    wide = x.float() * scales[:, None] + bias.float()
    return x.copy_(F.gelu(wide, approximate="tanh") if gelu else wide)


def quantized_why_not(kind: str, device: torch.device) -> str | None:
    """Why products of this kind cannot run on ``device``, or None."""
    if kind == "int8":
        if device.type != "cpu":
            return f"int8 products are for the CPU, not for {device}; 'fp8' is for CUDA"
        if "fbgemm" not in torch.backends.quantized.supported_engines and not (
            torch.backends.mkldnn.is_available()
        ):
            return "int8 products need a torch with oneDNN"
        return None
    if device.type != "cuda":
        return f"fp8 products are for CUDA, not for {device}; 'int8' is for the CPU"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "fp8 products with a scale a row need compute capability 9.0 (Hopper) or later"
    return None
