"""Every Triton kernel compiles for every supported GPU, in registers, and uses its tensor cores.

No GPU is needed. `kernel_resources.py` prints the numbers.
"""

from __future__ import annotations

import kernel_resources
import pytest
from cases import CASES
from kernel_resources import SHARED_MEMORY, TYPES
from triton_workers import compilers, require_triton

pytestmark = pytest.mark.slow
MATRIX_INSTRUCTION = {8: "HMMA", 9: "HGMMA", 10: "UTCHMMA", 12: "HMMA"}


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_no_spills_enough_shared_memory_and_tensor_cores(capability: int) -> None:
    require_triton()
    cases = [case for case in kernel_resources.cases() if case.capability == capability]
    descriptors = ["attention_tma"] if capability >= 90 else []
    assert {case.operator for case in cases} == {*CASES, *descriptors}
    measured = compilers().map(kernel_resources.measure, cases)
    for case, kernels in zip(cases, measured, strict=True):
        for kernel, resources in kernels.items():
            assert resources.spills == 0, f"{case}: {kernel} spills"
            assert resources.shared_bytes <= SHARED_MEMORY[capability], f"{case}: {kernel}"
        if case.operator.startswith("attention") and TYPES[case.dtype] != "fp32":
            # 16 tokens are fewer than a warp group's rows: mma.sync is what Hopper has for them.
            small = case.sizes[1] < 64
            wanted = "HMMA" if small else MATRIX_INSTRUCTION[capability // 10]
            assert all(r.matrix[wanted] > 0 for r in kernels.values()), str(case)
