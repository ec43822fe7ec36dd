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


def test_every_kernel_is_compiled_for_every_gpu_in_both_half_precisions_and_widths():
    types: dict[tuple[str, int], set[str]] = {}
    widths: dict[tuple[str, int], set[int]] = {}
    for case in CASES:
        key = case.operator, case.capability
        types.setdefault(key, set()).add(kernel_resources.TYPES[case.dtype])
        if case.operator not in ("attention", "attention_tma", "groupnorm_silu", "guided_step"):
            widths.setdefault(key, set()).add(case.sizes[-1])
    operators = set(kernel_resources.ARGUMENTS)
    for sm in kernel_resources.CAPABILITIES:
        here = operators - ({"attention_tma"} if sm < 90 else set())
        assert all({"bf16", "fp16"} <= types[operator, sm] for operator in here)
        for operator in here & {key[0] for key in widths} - {"gelu"}:  # gelu sees no rows
            wide = 4 if operator == "quantize_rows" else 1
            published = {wide * width for width in (384, 768, 1024, 1152)}
            assert published <= widths[operator, sm], (operator, sm)
