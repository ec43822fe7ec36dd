"""Whole sampler steps as CUDA graphs: one launch in place of some three hundred."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dit_engine.backends.capture import capture_graph
from dit_engine.backends.lean.conditioning import ModulationTable
from dit_engine.backends.lean.forward import LeanTransformer
from dit_kernels.dispatch import launcher

GRAPH_LIMIT = 8
"""How many graphs of one transformer are kept; the one unused for longest is dropped. Each has
inputs of its own (latents, tokens, modulations). All share one memory pool for their activations,
which is as large as the largest batch needs."""


class Turns:
    """Gives the graphs' common memory to one user at a time, across threads and streams.

    The lock puts the launches in order, and the event puts what they launch in order: on the
    device, the copies into a graph's inputs wait for the replay before them. The host waits for
    nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # All captures use one stream: a pool reuses memory only on the stream that it came from.
        self.capture_stream = torch.cuda.Stream(device)
        self.done = torch.cuda.Event()
        self._lock = threading.Lock()

    @contextmanager
    def take(self) -> Iterator[Any]:
        """The caller's current stream; what it runs from now on waits for all earlier turns."""
        with self._lock:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self.done)
            try:
                yield stream
            finally:
                self.done.record(stream)


class StepGraphs:
    """Captured steps, by (images, guided or not, guided channels). Threads may share it."""

    def __init__(self, transformer: LeanTransformer) -> None:
        self.transformer = transformer
        self._graphs: OrderedDict[tuple[int, bool, int], StepGraph] = OrderedDict()
        self._turns = Turns(transformer.device)
        self._lock = threading.Lock()

    def of(self, n: int, guide: bool, channels: int) -> StepGraph:
        key = (n, guide, channels)
        with self._lock:
            if key not in self._graphs:
                if len(self._graphs) >= GRAPH_LIMIT:
                    self._graphs.popitem(last=False)
                # The pool of a living graph: torch refuses one whose graphs are all gone.
                pool = next((g.graph.pool() for g in self._graphs.values()), None)
                self._graphs[key] = StepGraph(self.transformer, *key, self._turns, pool)
            self._graphs.move_to_end(key)
            return self._graphs[key]


class StepGraph:
    """One captured step of N images: static inputs, a replay, copies of the results.

    Args:
        turns: of all graphs that share a memory pool.
        pool: the memory pool of another graph; None makes one.
    """

    def __init__(
        self, transformer: LeanTransformer, n: int, guide: bool, channels: int, turns: Turns,
        pool: Any = None,
    ) -> None:  # fmt: skip
        config, dtype = transformer.config, transformer.dtype
        self.transformer, self.channels, self.turns = transformer, channels, turns
        self.rows = 2 * n if guide else n

        def static(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=transformer.device)

        self.z, self.x0_before, self.noise = (static(n, *config.latent_shape) for _ in range(3))
        self.coefficients, self.scales = static(9), static(n)
        width = (6 * config.depth + 2) * config.hidden_size
        self.modulation = static(self.rows, width, dtype=dtype)
        self.tokens = static(self.rows, config.num_tokens, config.hidden_size, dtype=dtype)
        self.update: Callable[..., Any] = launcher("guided_step", transformer.device)
        with turns.take(), torch.inference_mode():
            self.graph, self.results = capture_graph(self._step, turns.capture_stream, pool)

    def _step(self) -> tuple[Tensor, Tensor]:
        for half in self.tokens.split(len(self.z)):
            self.transformer.embed(self.z, half)
        output = self.transformer.forward(self.tokens, self.modulation)
        return self.update(
            output, self.z, self.x0_before, self.noise, self.scales, self.coefficients,
            self.channels, self.transformer.config.patch_size,
        )  # fmt: skip

    def __call__(
        self, z: Tensor, x0_before: Tensor, noise: Tensor, coefficients: Tensor, scales: Tensor,
        table: ModulationTable, step: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The step on these inputs; the results are the caller's own tensors."""
        with self.turns.take(), torch.inference_mode():
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

    def __del__(self) -> None:
        # The memory is free for the stream that it came from, which does not know of a replay that
        # still runs on another stream.
        self.turns.done.synchronize()
