"""Every Triton kernel compiles for every supported GPU, in registers, and uses its tensor cores.

No GPU is needed. `kernel_resources.py` prints the numbers.
"""

from __future__ import annotations

import functools
from concurrent.futures import Future

import kernel_resources
import pytest
from cases import CASES as OPERATORS
from kernel_resources import SHARED_MEMORY, TYPES, Resources
from triton_workers import compilers, require_triton

pytestmark = pytest.mark.slow

CASES = kernel_resources.cases()
MATRIX_INSTRUCTION = {8: "HMMA", 9: "HGMMA", 10: "UTCHMMA", 12: "HMMA"}


@functools.cache
def _measurement(index: int) -> Future[dict[str, Resources]]:
    return compilers().submit(kernel_resources.measure, CASES[index])


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_no_spills_enough_shared_memory_and_tensor_cores(capability: int) -> None:
    require_triton()
    here = [i for i, case in enumerate(CASES) if case.capability == capability]
    for index, measurement in [(i, _measurement(i)) for i in here]:
        case, measured = CASES[index], measurement.result()
        for kernel, resources in measured.items():
            assert resources.spills == 0, f"{case.name}: {kernel} spills"
            assert resources.shared_bytes <= SHARED_MEMORY[capability], f"{case.name}: {kernel}"
        if case.operator.startswith("attention") and TYPES[case.dtype] != "fp32":
            # 16 tokens are fewer than a warp group's rows: mma.sync is what Hopper has for them.
            small = case.sizes[1] < 64
            wanted = "HMMA" if small else MATRIX_INSTRUCTION[capability // 10]
            assert all(r.matrix.get(wanted, 0) > 0 for r in measured.values()), case.name


def test_every_kernel_is_compiled_for_every_gpu() -> None:
    for capability in SHARED_MEMORY:
        compiled = {case.operator for case in CASES if case.capability == capability}
        operators = {*OPERATORS, *(["attention_tma"] if capability >= 90 else [])}
        assert compiled == operators
