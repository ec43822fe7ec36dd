"""What the machine that made tests/data took for exp, cos and sin.

The published code computes the time step's sinusoids in float32 even inside a float64 model, with
whatever ``exp``, ``cos`` and ``sin`` the machine's vector library has. Those differ between makes
of CPU in the last bit: of the 128 frequencies exp(−ln(10000)·i/128), one or two come out one ulp
(unit in the last place) from the correctly rounded value, and the time step multiplies that by up
to 999. So on another make of machine the float64 model, run directly, is 1e-7 from the vectors and
a trajectory 1e-6, although everything after the conditioning vector c agrees to 1e-15. Tests of
that arithmetic take the sinusoids from the vectors:

* ``fit_time_embedding`` recovers the embedding of a time step from forward.out;
* ``frequencies_off`` tells which frequencies this process's ``exp`` rounds otherwise; where they
  are those of the vectors' machine (test_vectors_direct.py), nothing is taken from the vectors;
* ``vector_timestep_embedding`` has the frequencies of the vectors' machine. Of all offsets of one
  frequency by an ulp, one explains forward.out in both files, four times better than any other;
  MKL on Intel's processors has that one, and two of high index, which move less.

Tests of what runs on this machine allow it the sinusoids' share and no more: two libraries, each
with a frequency of its own that is an ulp off, differ by at most twice ``one_ulp_effect``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from numerics import relative_error
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import dit_engine.model
from dit_engine.model import DiT

# (index, ulps): where the vectors' machine was off the correctly rounded frequency.
FREQUENCY_OFFSET = (13, +1)


def frequencies_off(spacing: int = 128) -> list[tuple[int, int]]:
    """(index, ulps) of the frequencies that are not correctly rounded in this process."""
    exponents = -math.log(10000.0) * torch.arange(128, dtype=torch.float32) / spacing
    rounded, found = exponents.double().exp().float(), exponents.exp()
    off = found.view(torch.int32) - rounded.view(torch.int32)
    return [(int(i), int(off[i])) for i in off.nonzero()]


def vector_timestep_embedding(
    t: Tensor, spacing: int = 128, offset: tuple[int, int] | None = FREQUENCY_OFFSET
) -> Tensor:
    """(N,) → float32 (N, 256), with correctly rounded functions but for the offset frequency."""
    exponents = -math.log(10000.0) * torch.arange(128, dtype=torch.float32) / spacing
    frequencies = exponents.double().exp().float()  # correctly rounded
    if offset is not None:
        index, ulps = offset
        towards = torch.tensor(math.copysign(math.inf, ulps))
        for _ in range(abs(ulps)):
            frequencies[index] = torch.nextafter(frequencies[index], towards)
    angles = (t[:, None].float() * frequencies).double()
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def one_ulp_effect(run: Callable[[], Tensor]) -> float:
    """The most that run()'s result moves when one frequency is an ulp off; a relative error.

    Frequency 0 is exp(0) = 1 on every machine; from 32 on an ulp is an eighth of the first ones'.
    """
    with pytest.MonkeyPatch.context() as patch:

        def with_offset(offset: tuple[int, int] | None) -> Tensor:
            embedding = functools.partial(vector_timestep_embedding, offset=offset)
            patch.setattr(dit_engine.model, "timestep_embedding", embedding)
            return run()

        rounded = with_offset(None)
        return max(relative_error(with_offset((i, 1)), rounded) for i in range(1, 32))


def fit_time_embedding(model: DiT, x: Tensor, t: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """The time embedding (N, D) with which ``model`` gives ``out`` (N, C_out, S, S) exactly.

    Gauss-Newton from the model's own embedding, per sample: C_out·S² equations for D unknowns, so
    a model that is wrong anywhere below c leaves a residual that no embedding removes.
    """
    labels = model.y_embedder(y)
    fitted = []
    for i in range(len(x)):
        c = model.condition(t[i : i + 1], y[i : i + 1])[0]  # (D,)

        def forward(c: Tensor, x: Tensor = x[i : i + 1]) -> Tensor:
            return model.forward_conditioned(x, c[None]).flatten()  # (C_out·S²,)

        for _ in range(3):
            with sdpa_kernel(SDPBackend.MATH):  # the fused CPU kernel has no forward derivative
                jacobian = torch.func.jacfwd(forward)(c)  # (C_out·S², D)
            residual = out[i].flatten() - forward(c)
            c = c + torch.linalg.lstsq(jacobian, residual).solution
        fitted.append(c - labels[i])
    return torch.stack(fitted)
