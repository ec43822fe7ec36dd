"""Fixtures that several parts' tests share."""

from __future__ import annotations

import pytest
from vectors import Vectors, read_vectors


@pytest.fixture(params=["dit_p2_d24", "dit_p4_d72"])
def vectors(request: pytest.FixtureRequest) -> Vectors:
    return read_vectors(request.param)
