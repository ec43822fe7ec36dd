"""Energy: RAPL's counters in a made-up folder, a GPU's power as a made-up function."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from dit_bench.energy import GpuPower, Rapl, find_meter, joules_per_call


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    zones = (("intel-rapl:0", 900, "package-0"), ("intel-rapl:1", 50, "package-1"),
             ("intel-rapl:0:0", 7, "core"), ("intel-rapl:2", 500, "psys"))  # fmt: skip
    for name, energy, what in zones:
        zone = tmp_path / name
        zone.mkdir()
        (zone / "name").write_text(f"{what}\n")
        (zone / "energy_uj").write_text(f"{energy}\n")
        (zone / "max_energy_range_uj").write_text("1000\n")
    return tmp_path


def turn(folder: Path, zone: str, energy: int) -> None:
    (folder / f"intel-rapl:{zone}" / "energy_uj").write_text(f"{energy}\n")


def test_packages_are_summed_and_their_counters_wrap(powercap: Path) -> None:
    meter = Rapl(powercap)
    assert meter.source == "RAPL, 2 packages"  # parts are in these, and these in the platform's
    meter.start()
    turn(powercap, "2", 999)
    turn(powercap, "0", 300)  # 900 → 1000, 0 → 300
    turn(powercap, "1", 250)
    turn(powercap, "0:0", 999)
    assert meter.stop() == pytest.approx((400 + 200) / 1e6)
    meter.start()
    assert meter.stop() == 0


def test_joules_are_those_of_one_call(powercap: Path) -> None:
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1
        turn(powercap, "1", 50 + 3 * calls)
        time.sleep(0.005)

    assert joules_per_call(work, Rapl(powercap), seconds=0.05) == pytest.approx(3e-6)
    assert calls > 2


def test_power_is_summed_over_time() -> None:
    meter = GpuPower(lambda: 200.0)
    start = time.perf_counter()
    meter.start()
    time.sleep(0.1)
    joules = meter.stop()
    assert 200 * 0.1 <= joules <= 200 * (time.perf_counter() - start)


def test_a_machine_without_a_meter_says_so(tmp_path: Path) -> None:
    none = f"no RAPL counter of a package under {tmp_path}"
    assert find_meter(torch.device("cpu"), tmp_path) == none
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "name").write_text("psys\n")
    assert find_meter(torch.device("cpu"), tmp_path) == none
    (zone / "name").write_text("package-0\n")  # whose other files are missing
    assert "energy_range_uj" in str(find_meter(torch.device("cpu"), tmp_path))


def test_an_interrupted_meter_is_stopped() -> None:
    meter = GpuPower(lambda: 1.0)

    def work() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        joules_per_call(work, meter)
    assert not meter._thread.is_alive()
