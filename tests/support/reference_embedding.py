"""What the machine that made tests/data took for exp, cos and sin.

The published code computes the time step's sinusoids in float32 even inside a float64 model, with
the ``exp`` of the machine's vector library. Libraries differ in the last bit: of the 128
frequencies exp(−ln(10000)·i/128), one or two come out one ulp (unit in the last place) from the
correctly rounded value. So on another make of CPU the float64 model is 1e-7 from the vectors and a
trajectory 1e-6, although everything after the conditioning vector c agrees to 1e-15. Tests of that
arithmetic take the sinusoids from the vectors, by `fit_time_embedding` or with the one frequency
that was off on the vectors' machine (`RAISED`: of all offsets by an ulp it explains forward.out in
both files, four times better than any other). Tests of what runs on this machine allow it twice
`one_ulp_effect`, since two libraries may each have a frequency that is off.
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

RAISED = 13


def frequencies_off() -> list[tuple[int, int]]:
    """(index, ulps) of the frequencies that are not correctly rounded in this process."""
    exponents = -math.log(10000.0) * torch.arange(128, dtype=torch.float32) / 128
    rounded, found = exponents.double().exp().float(), exponents.exp()
    off = found.view(torch.int32) - rounded.view(torch.int32)
    return [(int(i), int(off[i])) for i in off.nonzero()]


def vector_timestep_embedding(t: Tensor, spacing: int = 128, raised: int | None = RAISED) -> Tensor:
    """(N,) → float32 (N, 256), correctly rounded, but for one frequency that is an ulp too high."""
    exponents = -math.log(10000.0) * torch.arange(128, dtype=torch.float32) / spacing
    frequencies = exponents.double().exp().float()
    if raised is not None:
        frequencies[raised] = torch.nextafter(frequencies[raised], torch.tensor(math.inf))
    angles = (t[:, None].float() * frequencies).double()
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def one_ulp_effect(run: Callable[[], Tensor]) -> float:
    """The most that run()'s result moves when one frequency is an ulp off; a relative error.

    Frequency 0 is exp(0) = 1 on every machine; from 32 on an ulp is an eighth of the first ones'.
    """

    def result(raised: int | None) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            embedding = functools.partial(vector_timestep_embedding, raised=raised)
            patch.setattr(dit_engine.model, "timestep_embedding", embedding)
            return run()

    rounded = result(None)
    return max(relative_error(result(i), rounded) for i in range(1, 32))


def fit_time_embedding(model: DiT, x: Tensor, t: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """The time embedding (N, D) with which ``model`` gives ``out`` (N, C_out, S, S) exactly.

    Gauss-Newton from the model's own embedding, per sample: C_out·S² equations for D unknowns, so
    a model that is wrong anywhere below c leaves a residual that no embedding removes.
    """
    fitted = []
    for i in range(len(x)):

        def forward(c: Tensor, x: Tensor = x[i : i + 1]) -> Tensor:
            return model.forward_conditioned(x, c[None]).flatten()  # (C_out·S²,)

        c = model.condition(t[i : i + 1], y[i : i + 1])[0]  # (D,)
        for _ in range(3):
            with sdpa_kernel(SDPBackend.MATH):  # the fused CPU kernel has no forward derivative
                jacobian = torch.func.jacfwd(forward)(c)  # (C_out·S², D)
            residual = out[i].flatten() - forward(c)
            c = c + torch.linalg.lstsq(jacobian, residual).solution
        fitted.append(c)
    return torch.stack(fitted) - model.y_embedder(y)
