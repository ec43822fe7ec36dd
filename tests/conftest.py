"""Fixtures that several parts' tests share."""

from __future__ import annotations

import os
import signal
import tempfile

import pytest
from vectors import Vectors, read_vectors

# A shell starts its background jobs with SIGINT ignored, and what the tests start would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# torch.compile's cache outlives a run, and what another left there, broken off or of other flags,
# is loaded without a question.
_COMPILED = tempfile.TemporaryDirectory(prefix="dit-engine-compiled-")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _COMPILED.name)


@pytest.fixture(params=["dit_p2_d24", "dit_p4_d72"])
def vectors(request: pytest.FixtureRequest) -> Vectors:
    return read_vectors(request.param)
