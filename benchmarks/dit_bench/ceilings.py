"""The highest rates of a machine, in matrix products and copies: kernels are measured against them.

Data are random: a matrix product of zeros takes less power, and therefore runs faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dit_bench.timing import Function, interleave, spread, sustained
from dit_engine.io.printable import one_line
from dit_kernels.quantized import FAST_ACCUMULATION

FP8 = torch.float8_e4m3fn
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8",
         FP8: "fp8"}  # fmt: skip
_SECONDS = 5.0


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device: 10^9 bytes read or written per second in a large copy; for each dtype,
    10^12 operations per second in a large square product, or why that is missing."""

    copy_gb_s: float
    matmul_tflop_s: dict[str, float]
    matmul_size: int
    copy_mib: int
    missing: dict[str, str] = field(default_factory=dict)

    def better(self, other: Ceilings) -> Ceilings:
        """The higher of each two rates, because other load on the machine can only lower a rate."""
        rates = {k: max(v, other.matmul_tflop_s.get(k, v)) for k, v in self.matmul_tflop_s.items()}
        return replace(self, copy_gb_s=max(self.copy_gb_s, other.copy_gb_s), matmul_tflop_s=rates)


def measure_ceilings(
    device: torch.device,
    *,
    size: int | None = None,
    copy_mib: int | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    rounds: int = 10,
    seconds: float | None = None,
) -> Ceilings:
    """Medians over ``rounds`` products of size × size matrices and copies of ``copy_mib``.

    A product that is too slow for so many rounds gets fewer. With ``seconds``, each product and
    copy is instead repeated without a pause for that time, which gives sustained rates.
    """
    cuda = device.type == "cuda"
    size, copy_mib = size or (8192 if cuda else 1024), copy_mib or (2048 if cuda else 256)
    if dtypes is None:
        dtypes = (torch.bfloat16, torch.float16, FP8) if cuda else (torch.float32, torch.bfloat16)

    def usual_ms(function: Function) -> float:
        if seconds is not None:
            return sustained(function, device, seconds)
        taken = interleave({"": function}, rounds, device=device, visit_ms=0, pause_s=0, warmup=2,
                           seconds=_SECONDS)  # fmt: skip
        return spread(taken[""]).median

    rates: dict[str, float] = {}
    missing: dict[str, str] = {}

    def measure(dtype: torch.dtype) -> None:
        try:
            rates[NAMES[dtype]] = 2 * size**3 / usual_ms(matmul(device, dtype, size)) / 1e9
        except (RuntimeError, NotImplementedError) as error:
            missing[NAMES[dtype]] = one_line(error)[:200]

    for dtype in dtypes:
        measure(dtype)
    source = torch.randint(256, (copy_mib * 2**20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_gb_s = 2 * source.numel() / usual_ms(lambda: target.copy_(source)) / 1e6
    return Ceilings(copy_gb_s, rates, size, copy_mib, missing)


def matmul(device: torch.device, dtype: torch.dtype, size: int) -> Callable[[], Tensor]:
    """A function that multiplies two random size × size matrices of ``dtype``."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    if dtype == torch.int8:
        a, b = (torch.randint(-127, 128, (size, size), dtype=dtype, device=device) for _ in "ab")
        product = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]
        return lambda: product(a, b)
    if dtype != FP8:
        out = torch.empty(size, size, dtype=dtype, device=device)
        return lambda: torch.mm(a, b, out=out)
    one, columns = torch.ones((), device=device), b.t()  # the second operand is column-major
    return lambda: torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        a, columns, one, one, out_dtype=torch.bfloat16, use_fast_accum=FAST_ACCUMULATION
    )
