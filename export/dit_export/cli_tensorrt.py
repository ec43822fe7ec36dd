"""``dit-export tensorrt``."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from dit_engine.io.directories import scratch_beside
from dit_engine.io.printable import say
from dit_export.source import add_source_arguments, given_export, load_source, refuse
from dit_export.targets import DTYPES, GRAPHS, VAE_GRAPH
from dit_export.tensorrt.installed import FLAVOURS, choose_flavour, require_device
from dit_export.tensorrt.profiles import parse_profiles

DEFAULT_BATCH = "1,2,8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--onnx", type=Path, help="a directory of dit-export onnx; without it, --model is exported")
    add_source_arguments(parser)
    add("--dtype", default="fp16", help=f"of a model that is exported: {', '.join(DTYPES)}")
    add("-o", "--output", type=Path, required=True, help="directory for the engines")
    add("--flavour", default="auto", help=f"which TensorRT: {', '.join(FLAVOURS)}")
    add("--graphs", nargs="+", metavar="GRAPH", help=f"some of {', '.join(GRAPHS)}; all there are")
    add("--batch", action="append", metavar="MIN,BEST,MAX",
        help=f"of a profile, {DEFAULT_BATCH} unless given; again for another profile")  # fmt: skip
    add("--size", metavar="MIN,BEST,MAX",
        help="sides of the VAE's latents; the model's own unless given")  # fmt: skip
    add("--workspace-gb", type=float, help="GiB that layers may use beside weights; no limit")
    add("--capability", action="append", default=[], metavar="X.Y",
        help="TensorRT for RTX: compute capability to build for; all unless given")  # fmt: skip
    add("--device", type=_index, default=0, help="GPU that the standard TensorRT builds on")
    add("--rebuild", action="store_true", help="build again what is there, whatever its state")
    add("--quiet", action="store_true", help="no progress bar")


def _index(text: str) -> int:
    number = text.removeprefix("cuda:")
    if not (number.isascii() and number.isdecimal()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no GPU; give its number, such as 0 or cuda:0"
        )
    return int(number)


def run(arguments: argparse.Namespace) -> int:
    from dit_export.onnx.export import ExportOptions, export_onnx
    from dit_export.tensorrt.build import BuildOptions, build_bundle

    batches, graphs = arguments.batch or [DEFAULT_BATCH], arguments.graphs
    graphs = None if graphs is None else tuple(dict.fromkeys(graphs))
    parse_profiles(batches, arguments.size)  # before anything is loaded
    exported = ExportOptions(dtype=arguments.dtype, target="tensorrt", graphs=graphs).checked()
    if arguments.output.exists() and not arguments.output.is_dir():
        raise NotADirectoryError(f"{arguments.output} is a file; a directory is needed")
    flavour = choose_flavour(arguments.flavour)
    if flavour.builds_without_gpu:
        refuse(arguments, ["device"], f"is for the standard TensorRT, and this is {flavour}")
    else:
        require_device(arguments.device, str(flavour))
    with ExitStack() as stack:
        if arguments.onnx is not None:
            bundle = given_export(arguments)
        else:
            source = load_source(arguments)
            folder = stack.enter_context(scratch_beside(arguments.output))
            bundle = export_onnx(
                source.model, folder / "onnx", exported, vae=source.vae,
                label_names=source.label_names, report=say,
            )  # fmt: skip
        if VAE_GRAPH not in (graphs or bundle.graphs):
            refuse(arguments, ["size"], f"is for {VAE_GRAPH}, and no such graph is built")
        options = BuildOptions(
            profiles=parse_profiles(batches, arguments.size or str(bundle.config.input_size)),
            workspace_gib=arguments.workspace_gb,
            capabilities=tuple(arguments.capability),
            device=arguments.device,
            rebuild=arguments.rebuild,
            quiet=arguments.quiet,
        )
        build_bundle(bundle, arguments.output, flavour, options, graphs, report=say)
    return 0
