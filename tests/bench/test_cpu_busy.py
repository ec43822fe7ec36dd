"""The forward beside busy programs: what is recorded, and that the programs work, wait and end."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from dit_bench.cpu_busy import Neighbours, busy_row, format_busy, interleave_busy


def processor_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:  # noqa: PTH123
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_neighbours_work_inside_the_block_alone_and_end_with_it() -> None:
    with Neighbours(2) as neighbours:
        pids = [program.pid for program in neighbours._programs]
        with neighbours.working():
            time.sleep(0.6)
        worked = [processor_seconds(pid) for pid in pids]
        time.sleep(0.3)
        assert [processor_seconds(pid) for pid in pids] == pytest.approx(worked, abs=0.02)
        assert min(worked) > 0.1
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_neighbour_ends_with_a_program_that_is_killed() -> None:
    code = (
        "import os; from dit_bench.cpu_busy import Neighbours\n"
        "with Neighbours(1) as n, n.working():\n"
        "    print(n._programs[0].pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:  # noqa: PTH123
            if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                return
        time.sleep(0.05)
    os.kill(pid, 9)
    pytest.fail("the neighbour still runs")


def test_a_neighbour_that_is_gone_is_told() -> None:
    with Neighbours(1) as neighbours:
        neighbours._programs[0].kill()
        neighbours._programs[0].wait()
        with pytest.raises(RuntimeError, match="ended before"), neighbours.working():
            pass


def test_visits_record_means_of_both_kinds() -> None:
    with Neighbours(1) as neighbours:
        samples = interleave_busy({"sleep": lambda: time.sleep(0.01)}, 2, neighbours, visit_ms=30)
    assert [len(samples["sleep"][kind]) for kind in ("idle", "busy")] == [2, 2]
    assert min(samples["sleep"]["idle"]) >= 10


def test_a_row_holds_the_medians_and_the_median_of_the_rounds_ratios() -> None:
    row = busy_row("lean bf16", {"idle": [1.0, 2.0, 9.0], "busy": [3.0, 2.0, 18.0]})
    assert row == {"who": "lean bf16", "idle_ms": 2.0, "busy_ms": 3.0, "ratio": 2.0}
    text = format_busy({"workload": "S/2, batch 2", "neighbours": 1, "busy": [row]})
    assert "lean bf16" in text and "2.00" in text
