"""Who takes part: the backend that is measured, and the peers that were asked for by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch

from dit_bench.cost import dit_cost
from dit_bench.forwards import Networks, Work, decoder_dtype
from dit_bench.generation_check import GenerationCheck
from dit_bench.latency import Contender
from dit_bench.memory import MemoryWatch
from dit_bench.peers import Function
from dit_bench.subjects import float_dtype
from dit_bench.unet import NAME as UNET
from dit_bench.unet import UNetWork, unet_cost
from dit_engine.backends import PRECISIONS, create_backend, known_backends, resolve_backend
from dit_engine.config import ModelConfig
from dit_engine.errors import BackendUnavailable
from dit_engine.model import DiT

LIBRARIES = ("diffusers", "openvino", "unet")
"""Peers that are no backends of the engine."""

CONDITIONS = ("conditioning", "adaln")
"""Parts of a network that depend on time step and label alone."""

Name = tuple[str, str]
"""A peer or a backend, and a precision."""


def known_peers() -> tuple[str, ...]:
    return (*LIBRARIES, *(name for name in known_backends() if name != "auto"))


def parse_peers(text: str, precision: str) -> list[Name]:
    """ "diffusers,onnxruntime/fp32" → names with their precisions, ``precision`` unless given.

    Where that one is quantised, peers have what its activations are in. Raises ValueError.
    """
    usual = {"int8": "bf16", "fp8": "bf16"}.get(precision, precision)
    found: list[Name] = []
    for part in text.split(","):
        name, _, own = part.strip().partition("/")
        if name in LIBRARIES:
            resolved = name
        else:
            try:
                resolved = resolve_backend(name)
            except ValueError:
                known = ", ".join(known_peers())
                raise ValueError(f"peer {name!r} is unknown; choose among {known}") from None
        if own and own not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise ValueError(f"peer {part!r}: precision {own!r} is none of {known}")
        if (pair := (resolved, own or usual)) not in found:
            found.append(pair)
    return found


def check_backend(name: str, precision: str, device: torch.device) -> None:
    """Raise what the backend says of this machine before a large model is made for it.

    What it warns of it will say again of the model itself.
    """
    with torch.device("meta"):
        model = DiT(ModelConfig(1, 64, 1, 2, 8, num_classes=1)).eval().requires_grad_(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            create_backend(name, model, precision, device)
    except (BackendUnavailable, ImportError, ValueError, OSError):
        raise
    except Exception:  # it came as far as the weights, of which this model has none
        return


class Cast:
    """Contenders for one kind of work and N images, the measured backend first.

    peers: without the measured backend itself.
    """

    def __init__(self, networks: Networks, subject: Name, peers: list[Name], macs: int) -> None:
        self.networks, self.subject = networks, subject
        self.peers = [peer for peer in peers if peer != subject]
        self.flops = 2 * macs  # of one row
        self.watch: MemoryWatch | None = None

    @property
    def config(self) -> ModelConfig:
        return self.networks.engine.config

    def forward(self, work: Work) -> list[Contender]:
        n, device = work.images, self.networks.engine.device
        own = partial(work.backend, *self.subject)
        found = [self._own(own, n, "subject", self.subject)]
        for name, precision in self.peers:
            if name == "unet":
                found.append(_unet(n, precision, device))
                continue
            build = {
                "diffusers": work.diffusers,
                "openvino": work.openvino,
                "compile": work.compiled,
                "eager": work.eager,
            }.get(name, partial(work.backend, name))
            found.append(self._own(partial(build, precision), n, "peer", (name, precision)))
        return found

    def step(self, work: Work) -> list[Contender]:
        return [
            self._own(partial(work.guided_step, *pair), 2 * work.images, role, pair)
            for role, pair in self._backends()
        ]

    def decode(self, work: Work, macs: int) -> list[Contender]:
        """macs: of one image's decoding."""
        found: dict[str, Contender] = {}  # int8 and bf16 decode alike: the first stands for both
        for role, (name, precision) in self._backends(("diffusers",)):
            build = partial(work.decode, name == "lean", precision)
            if name == "diffusers":
                build = partial(work.diffusers_decode, precision)
            dtype = "fp32" if decoder_dtype(precision) == torch.float32 else "bf16"
            title, flops = f"{name} {dtype}", 2 * macs * work.images
            found.setdefault(title, Contender(title, role, dtype, build, flops=flops))
        return list(found.values())

    def image(self, work: Work, check: GenerationCheck, decode_macs: int) -> list[Contender]:
        """Whole generations, as ``check`` says which."""
        steps, sampler = check.steps, check.sampler
        flops = work.images * (2 * steps * self.flops + 2 * decode_macs)  # guided: two rows
        return [
            Contender(f"{name} {precision}", role, precision,
                      partial(work.generation, name, precision, steps, sampler),
                      check=partial(check, name, precision), flops=flops)
            for role, (name, precision) in self._backends()
        ]  # fmt: skip

    def _backends(self, also: tuple[str, ...] = ()) -> list[tuple[str, Name]]:
        peers = [p for p in self.peers if p[0] not in LIBRARIES or p[0] in also]
        return [("subject", self.subject), *(("peer", pair) for pair in peers)]

    def _own(self, build: Callable[[], Function], rows: int, role: str, pair: Name) -> Contender:
        """A contender that computes this network on so many rows."""
        name, precision = pair
        if role == "subject" and self.watch is not None:
            build = self.watch.around(build)
        return Contender(
            f"{name} {precision}", role, precision, build, flops=self.flops * rows,
            weight_bytes=needed_weights(self.config) * _bytes(precision),
        )  # fmt: skip


def needed_weights(config: ModelConfig) -> int:
    """Parameters that every forward must read: not the conditioning's, a third of the model, which
    a sampler may compute before its loop. Counted, they would flatter whoever never reads them."""
    parts = dit_cost(config)
    return sum(cost.parameters for name, cost in parts.items() if name not in CONDITIONS)


def _bytes(precision: str) -> int:
    return {"fp32": 4, "int8": 1, "fp8": 1}.get(precision, 2)


def _unet(images: int, precision: str, device: torch.device) -> Contender:
    dtype = float_dtype(precision)

    def build() -> Function:
        function = UNetWork(images, device).function(dtype)
        if not bool(function().isfinite().all()):  # all that there is to check
            raise RuntimeError("its result is not finite")
        return function

    try:
        cost = unet_cost()
    except ImportError as error:  # said when it is built, as of every peer
        message = str(error)

        def missing() -> Function:
            raise ImportError(message)

        return Contender(f"{UNET} {precision}", "other network", precision, missing, checked=False)
    itemsize = torch.empty(0, dtype=dtype).element_size()
    return Contender(
        f"{UNET} {precision}", "other network", precision, build, checked=False,
        flops=cost.flops * images, weight_bytes=cost.parameters * itemsize,
    )  # fmt: skip
