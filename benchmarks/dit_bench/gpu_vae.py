"""Decoding latents to pixels with a VAE of random weights, checked before it is timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_bench.budget import Budget
from dit_bench.cpu_vae import DecodeModule, channels_last
from dit_bench.gpu_inputs import random_decoder
from dit_bench.gpu_report import Report, failure, skipped
from dit_bench.operator_checks import check_device, relative_error
from dit_bench.timing import interleave
from dit_engine.backends.compile import compile_graph
from dit_engine.backends.lean.vae import LeanDecoder
from dit_engine.runtime import is_out_of_memory
from dit_engine.vae import AutoencoderKL, VAEConfig

ERROR_RATIO = 2.0
"""Of a bf16 decoder: its error over that of torch's in bf16, at most."""
FP32_ERROR = 1e-4
"""Of a float32 decoder, at most: libraries may choose transformed convolutions."""
EXACT_BATCH = 1
"""Up to this batch the reference is float64, which is slow; beyond it float32."""
COMPILE_SECONDS = 45.0
EAGER = "eager bf16"

Decode = Callable[[Tensor], Tensor]
Row = dict[str, Any]


@dataclass
class DecodeBenchmark:
    """Records rows in ``report``'s section "decode".

    Attributes:
        side: of the latents; an image has ``config.downsampling`` times as many pixels.
    """

    report: Report
    device: torch.device
    budget: Budget
    config: VAEConfig
    side: int = 32
    batches: Sequence[int] = (1, 8)
    rounds: int = 20

    def run(self) -> None:
        """Raises `DeviceLost` where nothing more could be measured."""
        vae = random_decoder(self.config, self.device)
        for batch in self.batches:
            for row in self._rows(vae, batch):
                self.report.record("decode", row)
        torch.compiler.reset()

    def _rows(self, vae: AutoencoderKL, batch: int) -> list[Row]:
        draw = torch.Generator(self.device).manual_seed(batch)
        shape = (batch, self.config.latent_channels, self.side, self.side)
        z = torch.randn(shape, generator=draw, device=self.device)
        exact = self._exact(vae, z)
        makers: dict[str, Callable[[], Decode]] = {
            EAGER: lambda: _eager(vae),
            "lean bf16": lambda: LeanDecoder(vae, torch.bfloat16, self.device),
            "lean fp32": lambda: LeanDecoder(vae, torch.float32, self.device),
            "compile bf16": lambda: _compiled(vae),
        }
        pixels = self.side * self.config.downsampling
        rows: dict[str, Row] = {
            name: {"contender": name, "batch": batch, "pixels": pixels} for name in makers
        }
        passed: dict[str, Callable[[], Tensor]] = {}
        for name, make in makers.items():
            rows[name] |= self._check(name, make, z, exact, rows[EAGER].get("error"), passed)
        if passed:
            self._time(passed, rows)
        return list(rows.values())

    def _exact(self, vae: AutoencoderKL, z: Tensor) -> Tensor:
        if len(z) > EXACT_BATCH:
            return vae.decode(z)
        with torch.inference_mode(False), torch.no_grad():
            twin = copy.deepcopy(vae).double()
        return twin.decode(z.double())

    def _check(
        self,
        name: str,
        make: Callable[[], Decode],
        z: Tensor,
        exact: Tensor,
        eager: float | None,
        passed: dict[str, Callable[[], Tensor]],
    ) -> Row:
        if self.budget.left() <= (COMPILE_SECONDS if name.startswith("compile") else 0):
            return skipped("time budget")
        try:
            with torch.inference_mode(False), torch.no_grad():
                decode = make()
            error = relative_error(decode(z), exact)
        except Exception as broken:  # whatever one dies of, the others are still measured
            if is_out_of_memory(broken):
                return skipped("out of memory")
            check_device(self.device, f"the decoder {name}")
            return failure(broken)
        if name == EAGER:
            limit = float("inf")  # the yardstick itself; NaN fails
        elif name.endswith("fp32"):
            limit = FP32_ERROR
        elif eager is None:
            return skipped(f"{EAGER}, its yardstick, was not measured") | {"error": error}
        else:
            limit = ERROR_RATIO * eager
        if not error <= limit:
            reason = f"error {error:.3g}, allowed is {limit:.3g}"
            return {"status": "failed", "error": error, "reason": reason}
        if not name.endswith("fp32"):
            passed[name] = lambda: decode(z)
        return {"status": "ok", "error": error}

    def _time(self, passed: dict[str, Callable[[], Tensor]], rows: dict[str, Row]) -> None:
        try:
            taken = interleave(passed, self.rounds, device=self.device, seconds=3.0)
        except Exception as broken:
            check_device(self.device, "the timing of the decoders")
            for name in passed:
                rows[name] |= failure(broken)
            return
        for name in passed:
            ms = taken.ms(name)
            rows[name] |= {
                "ms": {"q10": ms.low, "median": ms.median, "q90": ms.high},
                "rounds": taken.rounds,
                "speedup_over_eager": taken.ratio(EAGER, name).median if EAGER in passed else None,
            }


def _eager(vae: AutoencoderKL) -> Decode:
    """In channels-last memory, which torch is quicker with."""
    twin = channels_last(copy.deepcopy(vae).bfloat16())

    def decode(z: Tensor) -> Tensor:
        half = z.to(torch.bfloat16, memory_format=torch.channels_last)
        return twin.decode(half).float()

    return decode


def _compiled(vae: AutoencoderKL) -> Decode:
    module = DecodeModule(channels_last(copy.deepcopy(vae).bfloat16()))
    run = compile_graph(module)

    def decode(z: Tensor) -> Tensor:
        return run(z.to(torch.bfloat16, memory_format=torch.channels_last)).float()

    return decode
