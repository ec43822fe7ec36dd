"""Our source files that are copied to places where this package is not installed."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from dit_engine._version import __version__

BACKEND = ("dit_engine.arguments", "dit_engine.io.printable", "dit_export.server.origin")
"""The modules beside `dit_export.server.onnxruntime_backend`. They need only numpy."""
LOOP = (
    *BACKEND,
    *("dit_engine.sampling.coefficients", "dit_engine.sampling.diffusion", "dit_engine.labels"),
    *("dit_engine.sampling.schedule", "dit_export.server.pipeline", "dit_export.server.sampling"),
)
"""The modules of the model "dit", which a repository holds as they are installed here. So the loop
on the server is the engine's own. They need only numpy."""
EARLIER = (
    *("dit_engine.coefficients", "dit_engine.diffusion", "dit_engine.printable"),
    *("dit_engine.schedule", "dit_export.triton.__init__", "dit_export.triton.origin"),
    *("dit_export.triton.pipeline", "dit_export.triton.sampling"),
    *("dit_export.triton.torch_random", "dit_export.server.torch_random"),
)
"""The modules of repositories that were written when these had other names."""

LOOP_ENTRY = f'''"""The loop on the server. Beside this file: parts of DiT Engine {__version__}."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # before any other version installed here

from dit_export.server.pipeline import TritonPythonModel  # noqa: E402, F401
'''


def packages(modules: Iterable[str]) -> dict[str, str]:
    """The files of packages that hold only these installed modules: path → content."""
    texts = {}
    for module in modules:
        *parents, name = module.split(".")
        for i in range(len(parents)):
            texts["/".join([*parents[: i + 1], "__init__.py"])] = '"""Parts of DiT Engine."""\n'
        texts["/".join([*parents, f"{name}.py"])] = source_of(module)
    return texts


def source_of(module: str) -> str:
    """The source text of an installed module."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())  # bytes, so that Windows does not change the ends of lines
