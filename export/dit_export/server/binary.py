"""Find a Triton Inference Server on this machine, and complete its backends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from dit_export.server.sources import BACKEND, packages, source_of, write_text


@dataclass(frozen=True)
class ServerBinary:
    """A tritonserver and what it needs to run.

    Attributes:
        backends: the directory of its own backends.
        stub: the helper program of the Python backend, if it does not lie beside that backend.
        environment: variables that must be set.
    """

    path: Path
    backends: Path
    stub: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


def find_server(given: Path | None = None) -> ServerBinary:
    """The server ``given`` (a tritonserver, or a virtual environment with nvidia-pytriton). Without
    it, the tritonserver on PATH, or else that of this Python's environment.

    Raises FileNotFoundError, in one line that says how to get a server.
    """
    if given is not None and given.is_dir():
        return _of_environment(given.absolute() / "bin" / "python")  # the server changes directory
    found = given or shutil.which("tritonserver")
    if found is None:
        return _of_environment(Path(sys.executable))
    path = Path(found).resolve()
    backends = path.parent.parent / "backends"  # as in NVIDIA's container
    if not path.is_file() or not (backends / "python").is_dir():
        raise FileNotFoundError(f"{path}: no tritonserver with its directory of backends beside it")
    return ServerBinary(path, backends)


def _of_environment(python: Path) -> ServerBinary:
    """The server of the package nvidia-pytriton beside the interpreter ``python``."""
    probe = (
        "import sysconfig as s, sys; print(s.get_path('purelib'), s.get_config_var('LIBDIR'), "
        "'%d.%d' % sys.version_info[:2], sep='\\n')"
    )
    where, command = python.parent.parent, [python, "-I", "-c", probe]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise FileNotFoundError(f"{where}: no virtual environment") from None
    site, libraries, version = done.stdout.splitlines()
    root = Path(site) / "pytriton" / "tritonserver"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise FileNotFoundError(
            f"no Triton Inference Server on PATH or in {where}: name one with --server, a "
            "tritonserver or a virtual environment with nvidia-pytriton, onnxruntime and numpy<2"
        )
    path = root / "bin" / "tritonserver"
    if not os.access(path, os.X_OK):  # installers may drop the permission
        path.chmod(path.stat().st_mode | 0o755)
    environment = {
        "LD_LIBRARY_PATH": f"{site}/nvidia_pytriton.libs:{libraries}",
        # The Python inside the server ignores PYTHONPATH. It takes the packages of the environment
        # whose python3 comes first on PATH.
        "PATH": f"{python.parent.absolute()}:{os.environ.get('PATH', os.defpath)}",
    }
    return ServerBinary(path, root / "backends", stub, environment)


def assemble_backends(server: ServerBinary, folder: Path) -> Path:
    """A backend directory with every backend that our repositories need, made in ``folder`` if the
    server's own is incomplete. Our onnxruntime backend in Python is used if the server has none."""
    if (server.backends / "onnxruntime").is_dir() and server.stub is None:
        return server.backends
    for backend in ("python", "tensorrt"):  # copied, because the server refuses links to elsewhere
        if (server.backends / backend).is_dir():
            shutil.copytree(server.backends / backend, folder / backend)
    if server.stub is not None:
        Path(shutil.copy2(server.stub, folder / "python")).chmod(0o755)
    source = source_of("dit_export.server.onnxruntime_backend")
    for name, text in {"model.py": source, **packages(BACKEND)}.items():
        write_text(folder / "onnxruntime" / name, text)
    return folder
