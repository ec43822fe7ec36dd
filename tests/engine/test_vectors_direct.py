"""The float64 vectors with nothing fitted and nothing replaced, where float32 ``exp`` is theirs.

torch's ``exp`` is Intel's MKL, which on other makes of processor takes another path and rounds
other frequencies by an ulp (`reference_embedding`). A library that answers MKL's question "is this
an Intel processor?" with yes, loaded before torch, puts it on the path of the machine that made the
vectors. In such a process these tests run; there the model and the samplers are theirs to 2e-15.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from shutil import which
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numerics import assert_close_to_reference
from reference_embedding import frequencies_off
from test_sampler import RUNS, sample
from vectors import Vectors

import dit_engine.sampling.samplers
from dit_engine.plan import parse_scales
from dit_engine.sampling.guidance import guided

# MKL's frequencies on Intel's processors with AVX-512, of which the first moves the vectors.
THEIRS = frequencies_off() == [(13, 1), (44, 1), (119, 1)]
theirs = pytest.mark.skipif(not THEIRS, reason="this process's exp rounds other frequencies")


@theirs
def test_forward(vectors: Vectors) -> None:
    x, t, y, out = (vectors[f"forward.{name}"] for name in ("x", "t", "y", "out"))
    assert_close_to_reference(vectors.model()(x.double(), t, y), out, tolerance=1e-10)


@theirs
def test_guidance(vectors: Vectors) -> None:
    model = vectors.model()
    x, t = vectors["forward.x"].double(), vectors["forward.t"]
    y = torch.cat([vectors["forward.y"], vectors.null])
    denoise = guided(
        lambda z, _: model(z, t.repeat(2)[: len(z)], y[: len(z)]),
        parse_scales(vectors.guidance_scale, len(x)),
    )
    assert_close_to_reference(denoise(x, 0), vectors["cfg.out"][: len(x)], tolerance=1e-10)


@theirs
@pytest.mark.parametrize("run", RUNS)
def test_trajectories(vectors: Vectors, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With MKL's square roots too, of which 1 in 160 is not correctly rounded, as ddim's are."""

    def sqrt(x: np.ndarray) -> np.ndarray:
        return torch.from_numpy(x).sqrt().numpy()

    numpy = SimpleNamespace(**vars(np) | {"sqrt": sqrt})
    monkeypatch.setattr(dit_engine.sampling.samplers, "np", numpy)
    out = sample(vectors, run, torch.float64)
    assert_close_to_reference(out, vectors[f"{run}.out"], tolerance=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(THEIRS, reason="the tests above ran in this process")
def test_all_of_these_on_mkls_path_for_intel(tmp_path: Path) -> None:
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if platform.system() != "Linux" or platform.machine() != "x86_64" or not which(compiler[0]):
        pytest.skip("needs MKL, LD_PRELOAD and a C compiler")
    if not torch.backends.mkl.is_available() or "avx512" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs a torch with MKL and a processor with AVX-512, as the vectors' had")
    source, library = tmp_path / "intel.c", tmp_path / "intel.so"
    source.write_text("int mkl_serv_intel_cpu_true(void) { return 1; }\n")
    subprocess.run([*compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
    )
    if "exp rounds other" in done.stdout:
        pytest.skip("MKL's path for this processor rounds other frequencies than the vectors'")
    assert done.returncode == 0, done.stdout
    assert f"{2 * (2 + len(RUNS))} passed" in done.stdout
