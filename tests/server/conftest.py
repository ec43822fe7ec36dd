"""Fixtures of the tests of Triton Inference Server."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def direct(no_proxy: None) -> None:
    """No test in this folder uses a proxy."""
