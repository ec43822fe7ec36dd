"""Matrix products with weights packed once and with their epilogue fused.

On CUDA, cuBLASLt computes them, and its epilogue adds the bias and applies the tanh-GELU. On the
CPU, oneDNN does, with weights in its blocked layout, or our own product where that beats oneDNN
(`dit_kernels.cpu.product`). Letters: R rows, K inputs, M outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_kernels import checks, reference
from dit_kernels.checks import Unavailable
from dit_kernels.cpu import product as native_product
from dit_kernels.dispatch import chosen, implementation, wants_gradient, without_autocast


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, impl: str = "auto") -> Tensor:
    """x (…, K) · weight (M, K)ᵀ + bias (M,) → (…, M), by the library ("auto") or the reference."""
    return _product(x, weight, bias, impl, gelu=False)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, impl: str = "auto") -> Tensor:
    """`linear`, then GELU in its tanh form (Hendrycks & Gimpel 2016)."""
    return _product(x, weight, bias, impl, gelu=True)


@without_autocast
def _product(x: Tensor, weight: Tensor, bias: Tensor, impl: str, gelu: bool) -> Tensor:
    checks.check_linear(x, weight, bias)
    if impl == "reference":
        return (reference.linear_gelu if gelu else reference.linear)(x, weight, bias)
    if impl != "auto":
        raise Unavailable(
            f"impl {impl!r}: products of unpacked weights stay with the library (impl 'auto')"
        )
    rows = x.reshape(-1, x.shape[-1])
    fused = gelu and x.is_cuda and not torch.compiler.is_compiling()  # a compiler fuses by itself
    if fused and not wants_gradient(x, weight, bias):
        out = torch.ops.aten._addmm_activation(bias, rows, weight.t(), use_gelu=True)  # tanh
    else:
        out = F.linear(rows, weight, bias)
        out = gelu_(out) if gelu else out
    return out.view(*x.shape[:-1], len(weight))


def gelu_(x: Tensor) -> Tensor:
    """tanh-GELU of a contiguous x, in place where there is a kernel for it.

    torch computes it under torch.compile, which can fuse it, and where a gradient is needed,
    because no kernel has a backward pass.
    """
    if not torch.compiler.is_compiling() and not wants_gradient(x):
        kind = chosen("gelu", "auto", x.device)
        if kind != "reference":
            return implementation("gelu", kind, x.device)(x, out=x)
    return F.gelu(x, approximate="tanh")


class PackedLinear:
    """A linear layer that keeps its weight only in the layout that the product reads.

    On the CPU that is the layout of our own product where it beats oneDNN
    (`dit_kernels.cpu.product.why_not`), else oneDNN's. There is no backward pass: an x that needs a
    gradient is refused.

    Args:
        weight: (M, K) on its device, in the dtype of the product.
        bias: (M,), of the same dtype.
        rows: how many rows x will have, if that is known: oneDNN's layout may depend on it.
    """

    def __init__(self, weight: Tensor, bias: Tensor, rows: int | None = None) -> None:
        checks.check_linear(weight.new_empty(0, weight.shape[1]), weight, bias)
        self.out_features, self.in_features = weight.shape
        self.dtype, self.device = weight.dtype, weight.device
        self.bias = bias.clone()  # a view could keep a whole mapped file in memory
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
        """Whether a row's bits do not depend on the other rows."""
        return self.native

    def __call__(self, x: Tensor, gelu: bool = False, out: Tensor | None = None) -> Tensor:
        """x (…, K) → (…, M), with tanh-GELU if asked for.

        out: contiguous memory for the result. It costs a copy unless the product is our own.
        """
        shape = (*x.shape[:-1], self.in_features)
        checks.check("x", x, shape, (self.dtype,), self.device, layout=None)
        if wants_gradient(x):
            raise Unavailable("PackedLinear has no backward pass; use linear, or torch.no_grad()")
        if self.native:
            return native_product.linear(x, self.weight, self.bias, self.out_features, gelu, out)
        made = self._by_library(x, gelu)
        return made if out is None else out.copy_(made)

    @without_autocast
    def _by_library(self, x: Tensor, gelu: bool) -> Tensor:
        if not self.onednn:
            return (linear_gelu if gelu else linear)(x, self.weight, self.bias)
        made = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        # oneDNN's own post-op is slower than the vectorised kernel on the result in cache.
        return gelu_(made) if gelu else made


def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of this dtype on this processor."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    half = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return half[dtype]() if dtype in half else dtype == torch.float32
