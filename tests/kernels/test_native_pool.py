"""The native kernels' threads, tested by a C++ program (pool.cpp), which sanitizers can run.

ThreadSanitizer: CXXFLAGS="-fsanitize=thread -g" pytest <this file>.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
POOL = ROOT / "kernels" / "csrc" / "cpu" / "pool" / "pool.cpp"
OWN = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # of make asan
CASES = {
    "jobs": "every piece once, in order of the calls",
    "helpers": "helpers take part",
    "callers": "several threads call at once",
    "forks": "a forked child has helpers of its own, also where another thread was in a call",
    "sleeps": "no processor time is spent between calls",
    "without threads": "where no thread can be started, the caller does everything",
}
UNSANITIZED = {
    "without threads": "sanitizers need the memory that this case takes away",
    "forks": "a child may hang in the sanitizer's allocator, whose locks fork copies as they are",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler or sys.platform != "linux":
        pytest.skip("needs Linux and a C++ compiler")
    made = tmp_path_factory.mktemp("pool") / "pool"
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-pthread"]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))  # of make asan
    sources = [str(Path(__file__).with_name("pool.cpp")), str(POOL)]
    subprocess.run([compiler, *flags, *sources, "-o", str(made)], env=OWN, check=True)
    return made


@pytest.mark.parametrize("case", CASES)
def test_the_pool(case: str, program: Path) -> None:
    if case in UNSANITIZED and "sanitize" in os.environ.get("CXXFLAGS", ""):
        pytest.skip(UNSANITIZED[case])
    command = [program, case]
    done = subprocess.run(command, env=OWN, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
