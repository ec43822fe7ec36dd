"""Ways to run a whole model, each behind the same two calls: evaluate it, and time it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dit_bench.gpu_peers import CompiledBlocksBackend, DiffusersBackend, MaxAutotuneBackend
from dit_engine.backends import Backend, Denoiser, Factory, known_backends
from dit_engine.backends.capture import capture_graph
from dit_engine.errors import BackendUnavailable

Evaluate = Callable[[Tensor, int], Tensor]

# x0 = ε and z' = x0: a sampler's step whose outcome is the model's own prediction.
_PREDICTION = (0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Contender:
    """A backend in a precision, run in some form.

    Attributes:
        form: "forward" calls the denoiser. "graph" replays a CUDA graph of that call, which takes
            the launches out: what a plain model could be at best. "step" is a whole sampler step
            of a backend that fuses it, which is more than a forward.
        late: measured after all models, because it takes minutes to get ready.
        seconds: what must be left of the time for it to be begun. With more than 0 it is measured
            after the others of its model and batch.
        timed: timed after the check, or checked only, with two rows.
        batches: the only ones it is measured with; None for all.
        factory: makes the backend, where it is none of the engine's.
        numerics: of the model that it runs, and is compared with.
        added: by another package; what it refuses, say for want of an address, it cannot run here.
    """

    name: str
    backend: str
    precision: str
    form: Literal["forward", "graph", "step"] = "forward"
    late: bool = False
    seconds: float = 0.0
    timed: bool = True
    batches: Sequence[int] | None = None
    factory: Factory | None = None
    numerics: Literal["official", "diffusers"] = "official"
    added: bool = False

    @property
    def quantized(self) -> bool:
        return self.precision in ("int8", "fp8")

    @property
    def generates(self) -> bool:
        """`Engine.generate` knows backends and precisions, and chooses the form itself."""
        return self.form == "forward" and self.timed and self.factory is None

    def meets(self, batch: int, check_batch: int) -> bool:
        """Whether it is measured with ``batch`` rows; ``check_batch`` is for those not timed."""
        if not self.timed:
            return batch == check_batch
        return self.batches is None or batch in self.batches


EAGER = Contender("eager bf16", "eager", "bf16")
CUDA_CONTENDERS = (
    EAGER,
    Contender("eager bf16 graph", "eager", "bf16", "graph"),
    Contender("lean bf16", "lean", "bf16"),
    Contender("lean bf16 step", "lean", "bf16", "step"),
    Contender("lean fp8", "lean", "fp8"),
    Contender("lean fp8 step", "lean", "fp8", "step"),
    Contender("lean fp32", "lean", "fp32", timed=False),
    Contender("diffusers bf16", "diffusers", "bf16", factory=DiffusersBackend,
              numerics="diffusers"),
    Contender("compile blocks bf16", "compile blocks", "bf16", seconds=30, batches=(2, 64),
              factory=CompiledBlocksBackend),
    Contender("compile blocks bf16 graph", "compile blocks", "bf16", "graph", seconds=30,
              batches=(2, 64), factory=CompiledBlocksBackend),
    Contender("compile bf16", "compile", "bf16", late=True, seconds=90, batches=(2,)),
    # Every product's candidates are timed while it compiles, minutes for a large model.
    Contender("autotune bf16", "max-autotune", "bf16", late=True, seconds=150, batches=(8,),
              factory=MaxAutotuneBackend),
)  # fmt: skip


def cuda_contenders() -> tuple[Contender, ...]:
    """`CUDA_CONTENDERS`, and every backend that another package adds to the engine."""
    ours = {"auto"} | {c.backend for c in CUDA_CONTENDERS}
    added = (
        Contender(f"{name} bf16", name, "bf16", late=True, seconds=60, batches=(2, 8), added=True)
        for name in known_backends()
        if name not in ours
    )
    return (*CUDA_CONTENDERS, *added)


def evaluator(
    contender: Contender, backend: Backend, labels: Tensor, timesteps: Tensor, like: Tensor
) -> Evaluate:
    """(x (B, C, S, S), step) → the prediction, all its channels or epsilon's alone.

    Args:
        labels: (B,); timesteps: (K,); like: an x, for its shape and device.

    Raises BackendUnavailable for a form that the backend does not have.
    """
    if contender.form == "step":
        return _stepped(contender, backend, labels, timesteps, like)
    denoiser = backend.prepare(labels, timesteps)
    if contender.form == "graph":
        return _graphed(denoiser, like)
    return denoiser


def _stepped(
    contender: Contender, backend: Backend, labels: Tensor, timesteps: Tensor, like: Tensor
) -> Evaluate:
    table, scales = np.tile(np.array(_PREDICTION), (len(timesteps), 1)), torch.ones(len(like))
    fused = backend.fuse(labels, timesteps, table, scales, like.shape[1])
    if fused is None:
        raise BackendUnavailable(f"backend {contender.backend!r} has no fused sampler step")
    zeros = torch.zeros_like(like)
    return lambda x, step: fused.guided_step(x, zeros, zeros, step, False)[0]


def _graphed(denoiser: Denoiser, like: Tensor) -> Evaluate:
    """A graph a step, captured when first asked for; its result is overwritten by the next."""
    static = torch.empty_like(like)
    graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def evaluate(x: Tensor, step: int) -> Tensor:
        static.copy_(x)
        if step not in graphs:
            stream = torch.cuda.Stream(like.device)
            graphs[step] = capture_graph(lambda: denoiser(static, step), stream)
        graph, result = graphs[step]
        graph.replay()
        return result

    return evaluate
