"""The float64 vectors with nothing fitted and nothing replaced, where float32 ``exp`` is theirs.

torch's ``exp`` is Intel's MKL, which on other makes of processor takes another path and rounds
other frequencies by an ulp (`reference_embedding`). A library that answers MKL's question "is this
an Intel processor?" with yes, loaded before torch, puts it on the path of the machine that made the
vectors: in such a process these tests run, and there the model is theirs to 1e-15.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics import assert_close_to_reference
from reference_embedding import FREQUENCY_OFFSET, frequencies_off
from test_sampler import RUNS, sample
from vectors import Vectors

from dit_engine.guidance import guided

THEIRS = FREQUENCY_OFFSET in frequencies_off()
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
        lambda z, _: model(z, t.repeat(2)[: len(z)], y[: len(z)]), len(x), vectors.guidance_scale
    )
    assert_close_to_reference(denoise(x, 0), vectors["cfg.out"][: len(x)], tolerance=1e-10)


@theirs
@pytest.mark.parametrize("run", RUNS)
def test_trajectories(vectors: Vectors, run: str) -> None:
    out = sample(vectors, run, torch.float64)
    assert_close_to_reference(out, vectors[f"{run}.out"], tolerance=1e-6)


@pytest.mark.skipif(THEIRS, reason="the tests above ran in this process")
def test_all_of_these_on_mkls_path_for_intel(tmp_path: Path) -> None:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if platform.system() != "Linux" or platform.machine() != "x86_64" or compiler is None:
        pytest.skip("needs MKL, LD_PRELOAD and a C compiler")
    if not torch.backends.mkl.is_available() or "avx512" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs a torch with MKL and a processor with AVX-512, as the vectors' had")
    source, library = tmp_path / "intel.c", tmp_path / "intel.so"
    source.write_text("int mkl_serv_intel_cpu_true(void) { return 1; }\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
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
