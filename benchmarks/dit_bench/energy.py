"""Energy where a machine reports it: RAPL's counters of the processor, a GPU's power.

RAPL counts whole packages, so everything else that runs on the machine is in its figure.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

POWERCAP = Path("/sys/class/powercap")
_INTERVAL_S = 0.02


class Meter(Protocol):
    """source says whose energy it is."""

    source: str

    def start(self) -> None: ...

    def stop(self) -> float:
        """Joules since `start`."""
        ...


class Rapl:
    """The packages' energy counters (microjoules, which wrap around) under ``folder``."""

    def __init__(self, folder: Path = POWERCAP) -> None:
        # "intel-rapl:0" may be a package (AMD's too) or the platform, "psys", which holds the
        # packages; "intel-rapl:0:1" is a part of one.
        zones = sorted(zone for zone in folder.glob("intel-rapl:*") if zone.name.count(":") == 1)
        self._zones = [z for z in zones if (z / "name").read_text().startswith("package")]
        if not self._zones:
            raise OSError(f"no RAPL counter of a package under {folder}")
        self._range = [self._read(zone, "max_energy_range_uj") for zone in self._zones]
        self._begin = self._now()  # raises where the counters are root's alone
        self.source = f"RAPL, {len(self._zones)} package{'s' * (len(self._zones) > 1)}"

    def start(self) -> None:
        self._begin = self._now()

    def stop(self) -> float:
        spent = 0
        for begin, end, full in zip(self._begin, self._now(), self._range, strict=True):
            spent += end - begin if end >= begin else end - begin + full
        return spent / 1e6

    def _now(self) -> list[int]:
        return [self._read(zone, "energy_uj") for zone in self._zones]

    @staticmethod
    def _read(zone: Path, name: str) -> int:
        return int((zone / name).read_text())


class GpuPower:
    """A GPU's power draw, summed up over time by a thread.

    power_w: the draw now, in watts.
    """

    def __init__(self, power_w: Callable[[], float], source: str = "GPU power (NVML)") -> None:
        self._power_w, self.source = power_w, source
        power_w()  # raises where the driver does not tell

    def start(self) -> None:
        self._joules, self._done = 0.0, threading.Event()
        self._last = (time.perf_counter(), self._power_w())
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL_S):
            self._add()

    def _add(self) -> None:
        now, power = time.perf_counter(), self._power_w()
        before, power_before = self._last
        self._joules += (now - before) * (power + power_before) / 2
        self._last = (now, power)

    def stop(self) -> float:
        self._done.set()
        self._thread.join()
        self._add()
        return self._joules


def find_meter(device: torch.device, folder: Path = POWERCAP) -> Meter | str:
    """The meter of ``device``, or in one line why there is none."""
    try:
        if device.type == "cuda":
            return GpuPower(lambda: torch.cuda.power_draw(device) / 1e3)
        return Rapl(folder)
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        return " ".join(str(error).split())[:200]


def joules_per_call(
    function: Callable[[], object],
    meter: Meter,
    synchronise: Callable[[], object] = lambda: None,
    seconds: float = 1.0,
) -> float:
    """Mean over as many calls as fill ``seconds``, the machine's idle power included."""
    synchronise()
    start, calls = time.perf_counter(), 0
    meter.start()
    try:
        while calls == 0 or time.perf_counter() - start < seconds:
            function()
            synchronise()
            calls += 1
    finally:
        joules = meter.stop()  # also ends its thread
    return joules / calls
