"""``dit-export triton``: write a model repository, or serve one for a developer."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from dit_export.source import add_source_arguments
from dit_export.targets import DTYPES
from dit_export.triton.configuration import ACCELERATORS, PLATFORMS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source_arguments(parser)
    parser.set_defaults(model=None)  # "builtin", but for a model that must fit --onnx
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


def run(arguments: argparse.Namespace) -> int:
    if arguments.serve is not None:
        if arguments.output is not None:
            raise ValueError("--serve and -o: give one of the two")
        from dit_export.triton.server import serve

        ports = (arguments.http_port, arguments.grpc_port, arguments.metrics_port)
        return serve(arguments.serve, arguments.server, arguments.host, ports)
    if arguments.output is None:
        raise ValueError("-o is missing: name the directory to make, or serve one with --serve")
    return _write(arguments)


def _write(arguments: argparse.Namespace) -> int:
    from dit_export.model_repository import check_free, write_repository
    from dit_export.triton.configuration import ServingOptions

    options = ServingOptions(
        platform=arguments.platform,
        accelerator=arguments.accelerator,
        max_batch_size=arguments.max_batch_size,
        instances=arguments.instances,
        pipelines=arguments.pipelines,
        queue_delay_us=arguments.queue_delay,
    ).checked()
    if options.platform == "tensorrt" and None in (arguments.onnx, arguments.engines):
        raise ValueError("platform 'tensorrt' needs --engines and the --onnx that they come from")
    check_free(arguments.output, arguments.overwrite)
    more: dict[str, Any] = {"engines": arguments.engines, "overwrite": arguments.overwrite}
    if arguments.onnx is not None:
        bundle = _given_export(arguments)
        path = write_repository(bundle, arguments.output, options, **more)
    else:
        arguments.output.absolute().parent.mkdir(parents=True, exist_ok=True)
        stem = f".{arguments.output.name}."
        with tempfile.TemporaryDirectory(
            prefix=stem, suffix=".onnx", dir=arguments.output.absolute().parent
        ) as folder:
            bundle = _own_export(arguments, Path(folder) / "onnx")
            path = write_repository(bundle, arguments.output, options, **more, move=True)
    files = [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    print(f"4 models, {size / 2**20:.1f} MiB → {path} (dit-export triton --serve {path})")
    return 0


def _given_export(arguments: argparse.Namespace) -> Any:
    from dit_export.bundle import Bundle
    from dit_export.source import load_source, weights_hash

    bundle = Bundle.open(arguments.onnx)
    if arguments.model is not None or arguments.checkpoint is not None:
        arguments.model = arguments.model or "builtin"
        if weights_hash(load_source(arguments).model) != bundle.checkpoint:
            raise ValueError(f"{arguments.onnx}: is an export of another model than --model")
    return bundle


def _own_export(arguments: argparse.Namespace, folder: Path) -> Any:
    from dit_export.onnx import ExportOptions, export_onnx
    from dit_export.source import load_source
    from dit_export.triton.configuration import GRAPHS

    options = ExportOptions(
        dtype=arguments.dtype,
        opset=arguments.opset,
        guided_channels=arguments.guidance_channels,
        graphs=tuple(GRAPHS.values()),
    ).checked()
    arguments.model = arguments.model or "builtin"
    source = load_source(arguments)
    if source.vae is None:
        raise ValueError(f"{arguments.model}: has no VAE; give one with --vae")
    return export_onnx(
        source.model,
        folder,
        options,
        vae=source.vae,
        label_names=source.label_names,
        report=print,
    )
