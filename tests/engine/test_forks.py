"""A forked child whose parent has run OpenMP generates the same images and does not hang."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import os, signal, sys, torch
from tiny import tiny_dit
from dit_engine import Engine

def made():
    engine = Engine(tiny_dit(), device="cpu", threads=2)
    options = dict(steps=2, seed=0, sampler="ddim", output="latent", precision="fp32")
    return [engine.generate([1, 2], backend=name, **options).images for name in ("lean", "eager")]

torch.set_num_threads(2)
torch.zeros(1 << 20).exp()
expected = made()
child = os.fork()
if child == 0:
    signal.alarm(20)
    same = all(map(torch.equal, made(), expected))
    torch.zeros(1 << 20).exp()
    os._exit(0 if same and torch.get_num_threads() == 1 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_generates_on_one_thread() -> None:
    path = os.pathsep.join(p for p in sys.path if p)
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, check=False, timeout=120)
    assert done.returncode == 0
