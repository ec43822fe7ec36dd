"""What a machine reaches at best: matrix products and copies, against which kernels are measured.

Data are random: a matrix product of zeros draws less power, and runs faster for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dit_bench.timing import interleave
from dit_kernels.quantized import FAST_ACCUMULATION

FP8 = torch.float8_e4m3fn
NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "int8",
    FP8: "fp8",
}

_SECONDS = 5.0


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of one device.

    copy_gb_s: bytes read plus bytes written, in 10^9 a second, of one large copy.
    matmul_tflop_s: dtype's name → 10^12 operations a second of one large square product.
    missing: dtype's name → why there is no figure.
    """

    copy_gb_s: float
    matmul_tflop_s: dict[str, float]
    matmul_size: int
    copy_mib: int
    missing: dict[str, str] = field(default_factory=dict)


def measure_ceilings(
    device: torch.device,
    *,
    size: int | None = None,
    copy_mib: int | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    rounds: int = 10,
) -> Ceilings:
    """Medians over ``rounds`` products of size × size matrices and copies of ``copy_mib``.

    A product so slow that ``rounds`` of it would take long gets fewer.
    """
    cuda = device.type == "cuda"
    size = size or (8192 if cuda else 1024)
    copy_mib = copy_mib or (2048 if cuda else 256)
    if dtypes is None:
        few = (torch.bfloat16, torch.float16, FP8) if cuda else (torch.float32, torch.bfloat16)
        dtypes = few
    rates: dict[str, float] = {}
    missing: dict[str, str] = {}
    for dtype in dtypes:
        rate = matmul_rate(device, dtype, size, rounds)
        if isinstance(rate, str):
            missing[NAMES[dtype]] = rate
        else:
            rates[NAMES[dtype]] = rate
    return Ceilings(copy_rate(device, copy_mib, rounds), rates, size, copy_mib, missing)


def copy_rate(device: torch.device, mib: int, rounds: int) -> float:
    """GB/s, reads and writes counted."""
    source = torch.randint(256, (mib * 2**20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = interleave({"copy": lambda: target.copy_(source)}, rounds, device=device, warmup=2)
    return 2 * source.numel() / taken.ms("copy").median / 1e6


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int, rounds: int) -> float | str:
    """TFLOP/s, or why this device has none."""
    try:
        product = matmul(device, dtype, size)
        taken = interleave({"product": product}, rounds, device=device, warmup=2, seconds=_SECONDS)
    except (RuntimeError, NotImplementedError) as error:
        return str(error).strip().split("\n")[0][:200]
    return 2 * size**3 / taken.ms("product").median / 1e9


def matmul(device: torch.device, dtype: torch.dtype, size: int) -> Callable[[], Tensor]:
    """A function that multiplies two random size × size matrices of ``dtype``."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    if dtype == torch.int8:
        a, b = (torch.randint(-127, 128, (size, size), dtype=dtype, device=device) for _ in "ab")
        product = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]
        return lambda: product(a, b)
    if dtype != FP8:
        out = torch.empty(size, size, dtype=dtype, device=device)
        return lambda: torch.mm(a, b, out=out)
    one = torch.ones((), device=device)
    columns = b.t()  # _scaled_mm takes its second operand column by column
    return lambda: torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        a, columns, one, one, out_dtype=torch.bfloat16, use_fast_accum=FAST_ACCUMULATION
    )
