"""Fixtures of the benchmarks' tests."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_dit, tiny_vae

from dit_bench.gpu import Plan
from dit_bench.gpu_contenders import EAGER
from dit_bench.operator_cases import block_cases


@pytest.fixture
def plan() -> Plan:
    """What the GPU benchmark measures, as little as shows its course, on the CPU."""
    return Plan(
        torch.device("cpu"),
        {"tiny": tiny_dit().config},
        block_cases(2, 5, 48, 2, torch.bfloat16, timed=True)[:4],
        contenders=(EAGER,),
        batches=(1, 2),
        images=(1,),
        rounds=2,
        ceilings={"size": 16, "copy_mib": 1, "rounds": 2},
        impls=("reference",),
        opposed=False,
        vae=tiny_vae().config,
        decoded_side=4,
    )
