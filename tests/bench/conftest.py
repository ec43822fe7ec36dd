"""Models and plans that the benchmarks are run on, small enough to run in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from tiny import NAMES, tiny_dit, tiny_vae

from dit_bench import gpu_vae, measure
from dit_bench.ceilings import measure_ceilings
from dit_bench.gpu import Plan
from dit_bench.gpu_contenders import EAGER
from dit_bench.operator_cases import block_cases
from dit_engine.checkpoint import save_pretrained


@pytest.fixture(autouse=True)
def lines_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of pytest-xdist set COLUMNS, in which tables would be folded."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="module")
def small_ceilings() -> Iterator[None]:
    """Measured, on less."""
    small = partial(measure_ceilings, size=64, copy_mib=2, rounds=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "measure_ceilings", small)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_pretrained(folder, tiny_dit(), tiny_vae(), label_names=NAMES)
    return str(folder)


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """What the GPU benchmark measures, as little as shows its course, on the CPU."""
    monkeypatch.setattr(gpu_vae, "_compiled", gpu_vae._eager)  # it would take most of a minute
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
