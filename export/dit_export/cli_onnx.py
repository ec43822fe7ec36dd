"""``dit-export onnx``."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from dit_engine.io.printable import printable, say
from dit_export.source import add_source_arguments, load_source, refuse
from dit_export.targets import (
    DTYPES,
    FLOATS,
    GRAPHS,
    QUANTIZED,
    QUANTIZED_GRAPHS,
    TARGETS,
    VAE_GRAPH,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source_arguments(parser)
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, help="directory to make")
    add("--dtype", default="fp16", help=", ".join(DTYPES))
    add("--target", default="onnxruntime", help=f"the runtime it is for: {', '.join(TARGETS)}")
    add("--opset", type=int, help="operator set; the best for dtype and target unless given")
    add("--graphs", nargs="+", metavar="GRAPH", help=f"some of {', '.join(GRAPHS)}; all there are")
    add("--guidance-channels", dest="guided_channels", type=int, default=3, metavar="COUNT",
        help="latent channels that guided_step guides")  # fmt: skip
    add("--vae-dtype", help=f"{', '.join(FLOATS)}; bf16 with bf16, else fp32, unless given")
    add("--external-data", dest="external_data_mib", type=int, default=512, metavar="MIB",
        help="graphs above this size keep their weights in a file beside them")  # fmt: skip
    add("--calibration-images", type=int, default=8, metavar="COUNT",
        help="int8, fp8: trajectories that the ranges of activations are taken from")  # fmt: skip
    add("--calibration-steps", type=int, default=8, metavar="COUNT", help="and their steps")
    add("--overwrite", action="store_true", help="replace an earlier export")


def run(arguments: argparse.Namespace) -> int:
    from dit_export.onnx.export import ExportOptions, export_onnx

    arguments.graphs = arguments.graphs and tuple(arguments.graphs)
    values = {field.name: getattr(arguments, field.name) for field in fields(ExportOptions)}
    options = ExportOptions(**values).checked()
    for names, users in (
        (["calibration_images", "calibration_steps"], QUANTIZED_GRAPHS),
        (["vae_dtype"], (VAE_GRAPH,)),
        (["guided_channels"], ("guided_step",)),
    ):
        if not set(options.graphs or GRAPHS) & set(users):
            refuse(arguments, names, f"is for {', '.join(users)}, which --graphs leaves out")
        if options.dtype not in QUANTIZED and users is QUANTIZED_GRAPHS:
            refuse(arguments, names, f"is for {' and '.join(QUANTIZED)}, and not {options.dtype}")
    source = load_source(arguments)
    if source.vae is None:
        refuse(arguments, ["vae_dtype"], "is for a VAE, and this model has none: give --vae")
    bundle = export_onnx(
        source.model, arguments.output, options, vae=source.vae, label_names=source.label_names,
        overwrite=arguments.overwrite, report=say,
    )  # fmt: skip
    size = sum(file["bytes"] for file in bundle.manifest["files"].values())
    made = f"{len(bundle.graphs)} graphs, {size / 2**20:.1f} MiB, opset {bundle.opset}"
    say(f"{made} → {printable(bundle.path)}")
    return 0
