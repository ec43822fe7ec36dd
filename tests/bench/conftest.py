"""A model that the benchmarks are run on, small enough to run in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
from tiny import NAMES, tiny_dit, tiny_vae

from dit_bench.ceilings import measure_ceilings
from dit_bench.speed import latency, models, operators
from dit_bench.timing import interleave
from dit_engine.checkpoint import save_pretrained


@pytest.fixture(autouse=True)
def lines_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of pytest-xdist set COLUMNS, in which tables would be folded."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="module")
def small_ceilings() -> Iterator[None]:
    """Measured on less, and every visit of a contender is one call."""
    small = partial(measure_ceilings, size=64, copy_mib=2, rounds=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "measure_ceilings", small)
        patch.setattr(operators, "measure_ceilings", small)
        patch.setattr(latency, "interleave", partial(interleave, visit_ms=0, pause_s=0))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_pretrained(folder, tiny_dit(), tiny_vae(), label_names=NAMES)
    return str(folder)
