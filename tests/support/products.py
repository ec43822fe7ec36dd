"""Matrix products that not every processor has."""

from __future__ import annotations

import pytest
import torch

from dit_kernels.quantized import quantized_why_not


def has_int8() -> bool:
    return quantized_why_not("int8", torch.device("cpu")) is None


def require_int8() -> None:
    """Skip what follows on processors without VNNI or AMX, where int8 products are refused."""
    if (reason := quantized_why_not("int8", torch.device("cpu"))) is not None:
        pytest.skip(reason)
