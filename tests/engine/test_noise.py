"""Noise on its way to a GPU, with a device that copies only when it is waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_engine.sampling import noise
from dit_engine.sampling.noise import AHEAD, PerImageNoise

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
SHAPE = (4, 8, 8)


class Device:
    """Copies in the order in which they were queued, as late as can be."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], object]] = []
        self.done = 0
        self.pinned: list[torch.Tensor] = []

    def run_to(self, position: int) -> None:
        for copy in self.queue[self.done : position]:
            copy()
        self.done = max(self.done, position)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()

    class PageLocked(torch.Tensor):
        def to(self, *target: Any, **how: Any) -> torch.Tensor:
            assert target == (CUDA,) and how == {"non_blocking": True}
            there = torch.full(self.shape, torch.nan)
            made.queue.append(lambda: there.copy_(self))
            return there

    class Event:
        position = 0

        def __init__(self, blocking: bool) -> None:
            assert blocking

        def record(self, stream: str) -> None:
            assert stream == "current of cuda:0"
            self.position = len(made.queue)

        def synchronize(self) -> None:
            made.run_to(self.position)

    def page_locked(shape: Any) -> torch.Tensor:
        made.pinned.append(torch.empty(*shape))
        return made.pinned[-1].as_subclass(PageLocked)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current of {device}")
    monkeypatch.setattr(noise, "_page_locked", page_locked)
    return made


def test_a_gpu_gets_the_cpus_numbers_and_the_host_does_not_wait(device: Device) -> None:
    """As many as `AHEAD` are under way; no buffer is filled before its copy has been made."""
    seeds = [3, 3, 2**63 - 1]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    expected = [
        torch.stack([torch.randn(SHAPE, generator=g) for g in generators]) for _ in range(12)
    ]
    here = PerImageNoise(seeds, SHAPE, CPU)
    assert all(map(torch.equal, [here.start(), *map(here, range(11))], expected))
    source = PerImageNoise(seeds, SHAPE, CUDA)
    found = [source.start()]
    assert len(device.pinned) == 1 and device.done == 0
    found += [source(k) for k in range(11)]
    assert device.done == 12 - AHEAD and len(device.pinned) == AHEAD
    device.run_to(12)
    assert all(map(torch.equal, found, expected))
