"""A Triton Inference Server that is installed here, and what it must be given to run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from dit_export.server.repository import packages, source_of, write_text

_PYTRITON = "pytriton/tritonserver"
# The modules of ours that our backend "onnxruntime" imports.
_BESIDE = ("dit_engine.arguments", "dit_engine.io.printable", "dit_export.server.origin")


@dataclass(frozen=True)
class ServerBinary:
    """A tritonserver and what it must be given to run.

    backends: its own backend directory. stub: the Python backend's helper, where it does not lie
    beside the backend. environment: variables to set.
    """

    path: Path
    backends: Path
    stub: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


def find_server(given: Path | None = None) -> ServerBinary:
    """``given`` (a tritonserver, or a virtual environment that holds nvidia-pytriton), else the one
    on PATH, else this Python's own.

    Raises FileNotFoundError, one line that says how to get one.
    """
    if given is not None:
        if given.is_dir():  # an absolute path, since the server runs in a directory of its own
            return _of_environment(given.absolute() / "bin" / "python")
        return _installed(given)
    if (found := shutil.which("tritonserver")) is not None:
        return _installed(Path(found))
    return _of_environment(Path(sys.executable))


def _installed(path: Path) -> ServerBinary:
    path = path.resolve()
    backends = path.parent.parent / "backends"  # as in NVIDIA's container
    if not path.is_file() or not (backends / "python").is_dir():
        raise FileNotFoundError(f"{path}: no tritonserver with its directory of backends beside it")
    return ServerBinary(path, backends)


def _of_environment(python: Path) -> ServerBinary:
    """The server in the wheel nvidia-pytriton, of the environment that ``python`` belongs to."""
    probe = (
        "import sysconfig as s, sys; print(s.get_path('purelib'), s.get_config_var('LIBDIR'), "
        "'%d.%d' % sys.version_info[:2], sep='\\n')"
    )
    where = python.parent.parent
    try:
        done = subprocess.run(
            [python, "-I", "-c", probe], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        raise FileNotFoundError(f"{where}: no virtual environment") from None
    site, libraries, version = done.stdout.splitlines()
    root = Path(site) / _PYTRITON
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise FileNotFoundError(
            f"no Triton Inference Server on PATH or in {where}: name one with --server, a "
            "tritonserver or a virtual environment with nvidia-pytriton, onnxruntime and numpy<2"
        )
    path = root / "bin" / "tritonserver"
    if not os.access(path, os.X_OK):  # a wheel need not keep the permission
        path.chmod(path.stat().st_mode | 0o755)
    environment = {
        "LD_LIBRARY_PATH": ":".join(
            filter(None, [f"{Path(site) / 'nvidia_pytriton.libs'}", libraries])
        ),
        # The Python inside the server heeds no PYTHONPATH: it takes the packages of the environment
        # in which PATH has its first python3.
        "PATH": f"{python.parent.absolute()}:{os.environ.get('PATH', os.defpath)}",
    }
    return ServerBinary(path, root / "backends", stub, environment)


def assemble_backends(server: ServerBinary, folder: Path) -> Path:
    """A backend directory in which both platforms of our repositories can be found.

    Where the server has no onnxruntime of its own, ours in Python takes its place.
    """
    complete = (server.backends / "onnxruntime").is_dir() and server.stub is None
    if complete:
        return server.backends
    for backend in ("python", "tensorrt"):  # copies: the server refuses links that lead out
        if (server.backends / backend).is_dir():
            shutil.copytree(server.backends / backend, folder / backend)
    if server.stub is not None:
        stub = folder / "python" / server.stub.name
        shutil.copyfile(server.stub, stub)
        stub.chmod(0o755)
    source = source_of("dit_export.server.onnxruntime_backend.model")
    for name, text in {"model.py": source, **packages(_BESIDE)}.items():
        write_text(folder / "onnxruntime" / name, text)
    return folder
