"""Which TensorRT is here: the standard one (module ``tensorrt``) or TensorRT for RTX.

Both modules have the same interface. Importing one may abort or hang where its libraries and the
driver do not agree, so it is first tried in a process of its own.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dit_engine.current_directory import python

PROBE_SECONDS = 60.0
"""An import that takes longer counts as one that hangs."""

# name → (module, extra); the order is that in which "auto" looks.
_FLAVOURS = {
    "tensorrt": ("tensorrt", "tensorrt"),
    "rtx": ("tensorrt_rtx", "tensorrt-rtx"),
}
FLAVOURS = ("auto", *_FLAVOURS)
LOWEST_MAJOR = {"tensorrt": 10, "rtx": 1}

_IMPORT = """
import json, sys
module = __import__(sys.argv[1])
print(json.dumps(module.__version__))
"""


@dataclass(frozen=True)
class Flavour:
    """A TensorRT that can be imported.

    Attributes:
        name: "tensorrt" or "rtx".
        module_name: what is imported.
        version: as the module gives it, such as "10.13.2.6"; engines are tied to all of it.
    """

    name: str
    module_name: str
    version: str

    @property
    def builds_without_gpu(self) -> bool:
        """TensorRT for RTX compiles for devices that are not there; the standard one times here."""
        return self.name == "rtx"

    @property
    def has_timing_cache(self) -> bool:
        """TensorRT for RTX chooses its kernels when an engine is loaded, and times none before."""
        return self.name == "tensorrt"

    def load(self) -> Any:
        return import_module(self.module_name)

    def __str__(self) -> str:
        title = "TensorRT for RTX" if self.name == "rtx" else "TensorRT"
        return f"{title} {self.version}"


def choose_flavour(name: str = "auto") -> Flavour:
    """The TensorRT that ``name`` stands for; "auto" is the standard one if both are installed.

    Raises:
        ValueError: an unknown name.
        ImportError: one line: it is not installed (with the extra that installs it), is too old,
            or its import fails, aborts or hangs.
    """
    if name not in FLAVOURS:
        raise ValueError(f"flavour {name!r}: choose one of {', '.join(FLAVOURS)}")
    wanted = tuple(_FLAVOURS) if name == "auto" else (name,)
    reasons = []
    for flavour in wanted:
        module, extra = _FLAVOURS[flavour]
        if importlib.util.find_spec(module) is None:
            reasons.append(f"{module} is not installed: pip install 'dit-engine[{extra}]'")
            continue
        version, reason = probe_import(module)
        if version is None:
            reasons.append(f"{module} cannot be imported: {reason}")
        elif int(version.split(".")[0]) < LOWEST_MAJOR[flavour]:
            reasons.append(f"{module} {version} is too old: {LOWEST_MAJOR[flavour]} is needed")
        else:
            return Flavour(flavour, module, version)
    raise ImportError("; ".join(reasons))


@functools.cache
def probe_import(module: str) -> tuple[str | None, str]:
    """(version, "") of a module that can be imported, else (None, why not); once a process."""
    output, reason = run_probe(_IMPORT, module)
    return (None, reason) if output is None else (output, "")


def run_probe(code: str, *arguments: str, timeout_seconds: float | None = None) -> tuple[Any, str]:
    """Run Python code that prints one line of JSON in another process: (the value, "").

    Where the process fails, aborts or takes too long: (None, why).
    """
    limit = PROBE_SECONDS if timeout_seconds is None else timeout_seconds
    try:
        done = subprocess.run(
            python(code, *arguments), capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {limit:g} s"
    if done.returncode < 0:
        return None, f"it ended with signal {-done.returncode}"
    if done.returncode > 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return None, lines[-1].strip() if lines else f"exit code {done.returncode}"
    try:
        return json.loads(done.stdout.splitlines()[-1]), ""
    except (IndexError, ValueError):
        return None, "it ended without an answer"
