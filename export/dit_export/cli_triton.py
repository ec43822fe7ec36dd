"""``dit-export triton``: write a model repository, or serve one for a developer."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dit_engine.io.directories import scratch_beside
from dit_engine.io.printable import printable, say
from dit_export.bundle import Bundle
from dit_export.server.configuration import ACCELERATORS, PLATFORMS
from dit_export.source import add_source_arguments, refuse
from dit_export.targets import DTYPES

READY_SECONDS = 300.0
_SERVE_ALONE = (
    "server", "host", "http_port", "grpc_port", "metrics_port", "ready_timeout", "verbose",
    "trust",
)  # fmt: skip


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
    add("--ready-timeout", type=float, default=READY_SECONDS, metavar="SECONDS",
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


def _serve(arguments: argparse.Namespace) -> int:
    others = arguments.given.keys() - {"serve", *_SERVE_ALONE}
    refuse(arguments, sorted(others), "is not for --serve, whose repository is as it was written")
    if not 0 < arguments.ready_timeout < float("inf"):
        raise ValueError(f"--ready-timeout {arguments.ready_timeout}: seconds above 0 are needed")
    from dit_export.server.process import serve

    ports = (arguments.http_port, arguments.grpc_port, arguments.metrics_port)
    return serve(
        arguments.serve,
        arguments.server,
        arguments.host,
        ports,
        arguments.ready_timeout,
        arguments.verbose,
        arguments.trust,
    )


def _write(arguments: argparse.Namespace) -> int:
    from dit_export.server.configuration import ServingOptions
    from dit_export.server.repository import check_dtypes, check_free, write_repository

    options = ServingOptions(
        platform=arguments.platform,
        accelerator=arguments.accelerator,
        max_batch_size=arguments.max_batch_size,
        instances=arguments.instances,
        pipelines=arguments.pipelines,
        queue_delay_us=arguments.queue_delay,
    ).checked()
    if options.platform == "tensorrt":
        if None in (arguments.onnx, arguments.engines):
            raise ValueError(
                "platform 'tensorrt' needs --engines and the --onnx that they come from"
            )
        refuse(arguments, ["accelerator"], "is for --platform onnxruntime")
    else:
        refuse(arguments, ["engines"], "are for --platform tensorrt")
    check_free(arguments.output, arguments.overwrite)
    more: dict[str, Any] = {"engines": arguments.engines, "overwrite": arguments.overwrite}
    if arguments.onnx is not None:
        from dit_export.source import given_export

        path = write_repository(given_export(arguments), arguments.output, options, **more)
    else:
        check_dtypes([arguments.dtype], options)
        export = _own_export(arguments)
        with scratch_beside(arguments.output) as folder:
            path = write_repository(
                export(folder / "onnx"), arguments.output, options, **more, move=True
            )
    files = [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    command = f"dit-export triton --serve {shlex.quote(str(path))}"
    say(printable(f"4 models, {size / 2**20:.1f} MiB → {path} ({command})"))
    return 0


def _own_export(arguments: argparse.Namespace) -> Callable[[Path], Bundle]:
    """What exports --model into a directory. Bad options and a bad model are refused before."""
    from dit_export.onnx.export import ExportOptions, export_onnx
    from dit_export.server.configuration import GRAPHS
    from dit_export.source import load_source

    options = ExportOptions(
        dtype=arguments.dtype,
        opset=arguments.opset,
        guided_channels=arguments.guidance_channels,
        graphs=tuple(GRAPHS.values()),
    ).checked()
    source = load_source(arguments)
    if source.vae is None:
        raise ValueError(f"{arguments.model}: has no VAE; give one with --vae")
    return partial(
        export_onnx,
        source.model,
        options=options,
        vae=source.vae,
        label_names=source.label_names,
        report=say,
    )
