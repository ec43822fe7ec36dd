"""``dit-export triton``: write a model repository, or serve one for a developer."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections import deque
from pathlib import Path
from typing import Any

from dit_engine.io.directories import check_destination, scratch_beside
from dit_engine.io.printable import printable, say
from dit_export.server.configuration import ACCELERATORS, GRAPHS, PLATFORMS, ServingOptions
from dit_export.source import add_source_arguments, given_export, load_source, refuse
from dit_export.targets import DTYPES

_SERVE_ALONE = (
    "server", "host", "http_port", "grpc_port", "metrics_port", "ready_timeout", "verbose",
    "trust",
)  # fmt: skip
_LAST_LINES = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source_arguments(parser)
    add = parser.add_argument
    add("-o", "--output", type=Path, help="directory to make")
    add("--onnx", type=Path, metavar="DIR", help="a finished export; else one is made of --model")
    add("--dtype", default="fp16", help=f"of the graphs: {', '.join(DTYPES)}")
    add("--opset", type=int, help="of the graphs; the best for the dtype unless given")
    add("--guidance-channels", type=int, default=3, metavar="COUNT",
        help="latent channels that are guided")  # fmt: skip
    add("--platform", default="onnxruntime", help=f"what runs the graphs: {', '.join(PLATFORMS)}")
    add("--engines", type=Path, metavar="DIR", help="of --platform tensorrt: engines of --onnx")
    add("--accelerator", default="cuda",
        help=f"of onnxruntime on a GPU: {', '.join(ACCELERATORS)}")  # fmt: skip
    add("--max-batch-size", type=int, default=16, help="images in one batch")
    add("--instances", type=int, default=1, help="of each graph on every device")
    add("--pipelines", type=int, default=2, help="sampling loops at once")
    add("--queue-delay", type=int, default=2000, metavar="MICROSECONDS",
        help="that a request may wait for others to share its batch")  # fmt: skip
    add("--overwrite", action="store_true", help="replace an earlier repository")
    add("--serve", type=Path, metavar="REPO", help="start a server of this repository instead")
    add("--server", type=Path, help="tritonserver, or a virtual environment with nvidia-pytriton")
    add("--host", default="127.0.0.1", help="address that --serve listens on")
    for name, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        add(f"--{name}-port", type=int, default=port, help="of --serve; 0 is any free one")
    add("--ready-timeout", type=float, default=300.0, metavar="SECONDS",
        help="of --serve: that loading and warming up may take")  # fmt: skip
    add("--trust", action="store_true",
        help="of --serve: also run code that this version did not write")  # fmt: skip
    add("--verbose", action="store_true", help="of --serve: show what the server prints")


def run(arguments: argparse.Namespace) -> int:
    if arguments.serve is not None:
        return _serve(arguments)
    refuse(arguments, _SERVE_ALONE, "is an option of --serve, which is not given")
    if arguments.output is None:
        raise ValueError("-o is missing: name the directory to make, or serve one with --serve")
    return _write(arguments)


def _write(arguments: argparse.Namespace) -> int:
    """Invalid options and models are refused before anything is exported or written."""
    from dit_export.server.repository import replaceable, write_repository

    names = ("platform", "accelerator", "max_batch_size", "instances", "pipelines")
    given = {name: getattr(arguments, name) for name in names}
    options = ServingOptions(**given, queue_delay_us=arguments.queue_delay).checked()
    if options.platform == "tensorrt":
        if None in (arguments.onnx, arguments.engines):
            raise ValueError(
                "platform 'tensorrt' needs --engines and the --onnx that they come from"
            )
        refuse(arguments, ["accelerator"], "is for --platform onnxruntime")
    else:
        refuse(arguments, ["engines"], "are for --platform tensorrt")
    path: Path = arguments.output
    check_destination(path, replaceable(arguments.overwrite))
    more = {"engines": arguments.engines, "overwrite": arguments.overwrite}
    if arguments.onnx is not None:
        write_repository(given_export(arguments), path, options, **more)
    else:
        _write_model(arguments, options, **more)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    command = f"dit-export triton --serve {shlex.quote(str(path))}"
    say(printable(f"4 models, {size / 2**20:.1f} MiB → {path} ({command})"))
    return 0


def _write_model(arguments: argparse.Namespace, options: ServingOptions, **more: Any) -> None:
    """Export --model, and make its graphs a repository."""
    from dit_export.onnx.export import ExportOptions, export_onnx
    from dit_export.server.repository import check_dtypes, write_repository

    check_dtypes([arguments.dtype], options)
    graphs = ExportOptions(
        dtype=arguments.dtype,
        opset=arguments.opset,
        guided_channels=arguments.guidance_channels,
        graphs=tuple(GRAPHS.values()),
    ).checked()
    source = load_source(arguments)
    if source.vae is None:
        raise ValueError(f"{arguments.model}: has no VAE; give one with --vae")
    vae, names = source.vae, source.label_names
    with scratch_beside(arguments.output) as folder:
        made = export_onnx(
            source.model, folder / "onnx", options=graphs, vae=vae, label_names=names, report=say
        )
        write_repository(made, arguments.output, options, **more, move=True)


def _serve(arguments: argparse.Namespace) -> int:
    """Run a server until Ctrl-C or SIGTERM; print its addresses when it is ready.

    The server's own output goes to standard error: all of it with --verbose, else its last lines if
    it fails.
    """
    others = arguments.given.keys() - {"serve", *_SERVE_ALONE}
    refuse(arguments, sorted(others), "is not for --serve, whose repository is as it was written")
    if not 0 < arguments.ready_timeout < float("inf"):
        raise ValueError(f"--ready-timeout {arguments.ready_timeout}: seconds above 0 are needed")
    from dit_export.server.binary import find_server
    from dit_export.server.process import running_server
    from dit_export.server.repository import check_marker

    check_marker(arguments.serve)
    server = find_server(arguments.server)
    ports = (arguments.http_port, arguments.grpc_port, arguments.metrics_port)
    last = deque[str](maxlen=_LAST_LINES)
    show = None if arguments.verbose else last.append
    options = (arguments.host, ports, arguments.ready_timeout, show, arguments.trust)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with running_server(arguments.serve, server, *options) as running:
            say(f"ready: http {running.http}, gRPC {running.grpc}, metrics {running.metrics}")
            client = printable(shlex.quote(str(arguments.serve / "client.py")))
            say(f"python {client} {running.http} images.png 50 0; Ctrl-C ends it", flush=True)
            raise OSError(f"the server ended with code {running.process.wait()}")
    except KeyboardInterrupt:
        return 0
    except OSError:
        for line in last:
            say(line, sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
