"""Every kernel compiles for every supported GPU, in registers, and uses its tensor cores.

No GPU is needed. Registers and shared memory are those of the committed table when the installed
Triton is the table's; another version must still spill nothing and use the matrix instructions.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
from concurrent.futures import Future

import kernel_resources
import pytest
from kernel_resources import Resources
from triton_workers import compilers, require_triton

pytestmark = pytest.mark.slow

CASES = kernel_resources.cases()
MATRIX_INSTRUCTION = {8: "HMMA", 9: "HGMMA", 10: "UTCHMMA", 12: "HMMA"}


@functools.cache
def _measurement(index: int) -> Future[dict[str, Resources]]:
    return compilers().submit(kernel_resources.measure, CASES[index])


@functools.cache
def _table() -> dict:
    return json.loads(kernel_resources.TABLE.read_text())


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])
def test_resources(index: int):
    require_triton()
    # The next cases compile in the other processes meanwhile.
    measurements = [_measurement(i) for i in range(index, min(index + 4, len(CASES)))]
    case, measured = CASES[index], measurements[0].result()
    for kernel, resources in measured.items():
        assert resources.spills == 0, f"{kernel} spills"
    # 16 tokens are fewer than a warp group's rows: mma.sync is what Hopper has for them.
    if case.operator.startswith("attention") and kernel_resources.TYPES[case.dtype] != "fp32":
        small = case.sizes[1] < 64
        wanted = "HMMA" if small else MATRIX_INSTRUCTION[case.capability // 10]
        assert all(r.matrix.get(wanted, 0) > 0 for r in measured.values())
    if importlib.metadata.version("triton") == _table()["triton"]:
        recorded = _table()["cases"][case.name]
        assert {k: r._asdict() for k, r in measured.items()} == recorded


def test_the_table_holds_these_cases_and_no_others():
    assert list(_table()["cases"]) == [case.name for case in CASES]
