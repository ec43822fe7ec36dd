"""Programs that stand in for tritonserver, so that no real one has to be started."""

from __future__ import annotations

import sys
from pathlib import Path

_READY = """
import http.server, os, signal, sys
from pathlib import Path

folder, kind, *options = sys.argv[1:]
options = dict(option.split("=", 1) for option in options if "=" in option)

class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        Path(folder, "ready").write_text(str(region))

    def log_message(self, *_):
        pass

region = Path("/dev/shm", options["--backend-config"].rpartition("=")[2] + "region")
if region.parent.is_dir():
    region.touch()
if kind == "stubborn":
    signal.signal(signal.SIGINT, lambda *_: Path(folder, "asked").touch())
address = options["--http-address"], int(options["--http-port"])
http.server.HTTPServer(address, Ready).serve_forever()
"""


def fake_server(folder: Path, script: str) -> Path:
    """A tritonserver that runs a shell script, with backends beside it as in NVIDIA's container."""
    path = folder / "bin" / "tritonserver"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    for backend in ("python", "onnxruntime"):
        (folder / "backends" / backend).mkdir(parents=True)
    return path


def ready_server(folder: Path, stubborn: bool = False) -> Path:
    """A tritonserver that makes a region of shared memory, and writes its path to ``folder``/ready
    when it is asked whether it is ready.

    stubborn: on SIGINT it does not end, but makes the file ``folder``/asked.
    """
    kind = "stubborn" if stubborn else "obedient"
    path = fake_server(folder, f'exec {sys.executable} -S {folder}/ready.py {folder} {kind} "$@"')
    (folder / "ready.py").write_text(_READY)
    return path
