"""One forward pass of a DiT on the CPU, and everyone who can run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_bench.peers import (
    Function,
    Peer,
    diffusers_transformer,
    openvino_function,
    randomise,
    relative_error,
)
from dit_engine.backends import create_backend
from dit_engine.backends.compile import compile_static
from dit_engine.backends.eager import placed
from dit_engine.backends.lean.forward import LeanTransformer
from dit_engine.checkpoint.weights import without_storage
from dit_engine.config import ModelConfig
from dit_engine.model import DiT, position_embedding

STEPS = 20  # of a sampler, over which the hoisted conditioning is spread
_STEP = 7  # the one that is timed


def random_model(config: ModelConfig, seed: int = 0) -> DiT:
    """A float32 DiT whose every weight is random, in eval mode."""
    with without_storage():
        model = DiT(config)
    model.to_empty(device="cpu")
    side = config.input_size // config.patch_size
    model.pos_embed.data.copy_(position_embedding(config.hidden_size, side))
    randomise(model, seed)
    return model.eval().requires_grad_(False)


class Forward:
    """One forward pass of ``model`` (float32, numerics "diffusers") and everyone who can run it.

    Half of the rows are labelled, half are not, as under guidance. Raises ValueError for an odd
    batch and for a model that diffusers cannot equal.
    """

    def __init__(self, model: DiT, batch: int, threads: int) -> None:
        config = model.config
        if batch < 2 or batch % 2:
            raise ValueError(f"batch {batch} is not a positive even number")
        if config.numerics != "diffusers":
            raise ValueError(f"numerics {config.numerics!r}: diffusers computes only 'diffusers'")
        generator = torch.Generator().manual_seed(1)
        shape = (batch, config.in_channels, config.input_size, config.input_size)
        self.model, self.threads = model, threads
        self.x = torch.randn(shape, generator=generator)
        labels = torch.randint(config.num_classes, (batch // 2,), generator=generator)
        self.labels = torch.cat([labels, torch.full_like(labels, config.null_class)])  # (N,)
        self.timesteps = torch.linspace(999, 0, STEPS).round().long()  # (K,)
        self.t = self.timesteps[_STEP].expand(batch).contiguous()  # (N,)
        self._twin: DiT | None = None
        self._backends: dict[str, Any] = {}

    @property
    def twin(self) -> DiT:
        """The model in bf16; every bf16 peer that keeps torch's layout shares these weights."""
        if self._twin is None:
            self._twin = placed(self.model, torch.bfloat16, torch.device("cpu"))
        return self._twin

    def expected(self) -> Tensor:
        with torch.inference_mode():
            return self.model(self.x, self.t, self.labels)

    def bf16_error(self, expected: Tensor) -> float:
        with torch.inference_mode():
            return relative_error(self.eager()(), expected)

    def eager(self) -> Function:
        twin = self.twin
        return lambda: twin(self.x.bfloat16(), self.t, self.labels).float()

    def compiled(self, mode: str) -> Function:
        """torch.compile of the reference model for this one shape, which is its best case.

        mode: of torch.compile; with "frozen " before it, weights are constants, which the compiler
        packs as lean does.
        """
        module = self.twin
        frozen = mode.startswith("frozen ")

        def forward(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return module(x, t, y)

        mode = mode.removeprefix("frozen ")
        run = compile_static(forward, mode=mode)
        if frozen:
            from torch._inductor import config

            with config.patch(freezing=True), torch.no_grad():  # compiled at the first call
                run(self.x.bfloat16(), self.t, self.labels)
        return lambda: run(self.x.bfloat16(), self.t, self.labels).float()

    def diffusers(self, dtype: torch.dtype) -> Function:
        source = self.model if dtype == torch.float32 else self.twin
        theirs = diffusers_transformer(source)

        def run() -> Tensor:
            output = theirs(self.x.to(dtype), timestep=self.t, class_labels=self.labels)
            return output.sample.float()

        return run

    def openvino(self, precision: str) -> Function:
        """The network below its conditioning, which is computed before the timing begins.

        OpenVINO's bf16 graph would round the angles of the time step's sinusoids, up to 999
        radians, to 8 bits: another function.
        """
        with torch.inference_mode(False), torch.no_grad():
            c = self.model.condition(self.t, self.labels)  # (N, D)
        module = _Conditioned(self.model)
        return openvino_function(module, (self.x, c), precision, self.threads)

    def lean(self, precision: str) -> Function:
        denoise = self._lean_backend(precision).prepare(self.labels, self.timesteps)
        return lambda: denoise(self.x, _STEP)

    def lean_start(self, precision: str) -> Function:
        """The first step with the conditioning of all ``STEPS`` before it."""
        backend = self._lean_backend(precision)
        return lambda: backend.prepare(self.labels, self.timesteps)(self.x, 0)

    def lean_transformer(self, precision: str) -> LeanTransformer:
        """The one that `lean` runs, with its packed weights."""
        return self._lean_backend(precision).transformer

    def _lean_backend(self, precision: str) -> Any:
        if precision not in self._backends:
            # From the float32 weights, as the peers: each rounds them once.
            backend = create_backend("lean", self.model, precision, torch.device("cpu"))
            self._backends[precision] = backend
        return self._backends[precision]


class _Conditioned(nn.Module):
    """`DiT.forward_conditioned` as a forward, for exporters."""

    def __init__(self, model: DiT) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.model.forward_conditioned(x, c)


def forward_peers(forward: Forward, compile_modes: Sequence[str]) -> list[Peer]:
    """Everyone but the linears timed alone; OpenVINO first, whose conversion needs most memory."""
    return [
        Peer("openvino bf16", "bf16", lambda: forward.openvino("bf16")),
        *(
            Peer(f"compile bf16 {mode}", "bf16", lambda mode=mode: forward.compiled(mode))
            for mode in compile_modes
        ),
        Peer("diffusers fp32", "fp32", lambda: forward.diffusers(torch.float32)),
        Peer("diffusers bf16", "bf16", lambda: forward.diffusers(torch.bfloat16)),
        Peer("eager bf16", "bf16", forward.eager),
        Peer("lean bf16", "bf16", lambda: forward.lean("bf16")),
        Peer("lean bf16 start", None, lambda: forward.lean_start("bf16")),
        Peer("lean int8", "int8", lambda: forward.lean("int8")),
        Peer("lean int8 start", None, lambda: forward.lean_start("int8")),
    ]
