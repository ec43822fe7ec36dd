"""Whole sampler steps as CUDA graphs: one launch in place of some three hundred."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from dit_engine.conditioning import ModulationTable
from dit_engine.lean import LeanTransformer
from dit_kernels.choose import launcher

GRAPH_LIMIT = 8
"""Graphs kept at once; the one unused for longest is dropped. They share one memory pool."""


class StepGraphs:
    """Captured steps, by (images, guided or not, guided channels). Threads may share it."""

    def __init__(self, transformer: LeanTransformer) -> None:
        self.transformer = transformer
        self._graphs: OrderedDict[tuple[int, bool, int], StepGraph] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, n: int, guide: bool, channels: int) -> StepGraph:
        key = (n, guide, channels)
        with self._lock:
            if key not in self._graphs:
                if len(self._graphs) >= GRAPH_LIMIT:
                    self._graphs.popitem(last=False)
                self._graphs[key] = StepGraph(self.transformer, *key)
            self._graphs.move_to_end(key)
            return self._graphs[key]


class StepGraph:
    """One captured step of N images: static inputs, a replay, copies of the results."""

    def __init__(self, transformer: LeanTransformer, n: int, guide: bool, channels: int) -> None:
        config, device = transformer.config, transformer.device
        self.transformer, self.channels = transformer, channels
        self.rows = 2 * n if guide else n
        shape = (n, config.in_channels, config.input_size, config.input_size)
        self.z, self.x0_before, self.noise = (torch.zeros(shape, device=device) for _ in range(3))
        self.coefficients = torch.zeros(9, device=device)
        self.scales = torch.ones(n, device=device)
        width = (6 * config.depth + 2) * config.hidden_size
        self.modulation = torch.zeros(self.rows, width, dtype=transformer.dtype, device=device)
        self.tokens = torch.empty(
            self.rows, config.num_tokens, config.hidden_size, dtype=transformer.dtype, device=device
        )
        self.update: Callable[..., tuple[Tensor, Tensor]] = launcher("guided_step", device)
        self._lock = threading.Lock()
        self._capture()

    def _capture(self) -> None:
        # Libraries choose their kernels and allocate workspaces at the first calls, which must
        # not be captured; a stream of its own is what capture asks for.
        stream = torch.cuda.Stream(self.transformer.device)
        stream.wait_stream(torch.cuda.current_stream(self.transformer.device))
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream):
                self.results = self._step()
        torch.cuda.current_stream(self.transformer.device).wait_stream(stream)

    def _step(self) -> tuple[Tensor, Tensor]:
        for half in self.tokens.split(len(self.z)):
            self.transformer.embed(self.z, half)
        output = self.transformer.forward(self.tokens, self.modulation)
        return self.update(
            output, self.z, self.x0_before, self.noise, self.scales, self.coefficients,
            self.channels, self.transformer.config.patch_size,
        )  # fmt: skip

    def __call__(
        self,
        z: Tensor,
        x0_before: Tensor,
        noise: Tensor,
        coefficients: Tensor,
        scales: Tensor,
        table: ModulationTable,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        """The step on these inputs; the results are the caller's own tensors."""
        with self._lock, torch.inference_mode():
            for static, given in (
                (self.z, z),
                (self.x0_before, x0_before),
                (self.noise, noise),
                (self.coefficients, coefficients),
                (self.scales, scales),
            ):
                static.copy_(given)
            table.step(step, self.rows, out=self.modulation)
            self.graph.replay()
            after, x0 = self.results
            return after.clone(), x0.clone()
