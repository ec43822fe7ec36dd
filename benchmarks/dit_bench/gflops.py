"""``dit-bench gflops``: the paper's twelve models beside our count, the decoder and the U-Net.

The published figures are those of Peebles & Xie 2022 (arXiv 2212.09748): in the appendix's table,
"Flops (G)" at 256 px, which are multiply-adds, and "Params (M)", which leave out the fixed position
table. Section 5.1 gives DiT-XL/2 at 512 px.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from dit_bench.cost import decoder_record, model_record
from dit_bench.report import Report, Row, new_report
from dit_engine.config import PUBLISHED, ModelConfig
from dit_engine.console.output import STDOUT
from dit_engine.vae import VAEConfig

SIZES = (256, 512)
SOURCE = "Peebles & Xie 2022, arXiv 2212.09748, appendix, table of all models; 512 px: section 5.1"
GFLOPS = {
    256: {
        "S/8": 0.36, "S/4": 1.41, "S/2": 6.06,
        "B/8": 1.42, "B/4": 5.56, "B/2": 23.01,
        "L/8": 5.01, "L/4": 19.70, "L/2": 80.71,
        "XL/8": 7.39, "XL/4": 29.05, "XL/2": 118.64,
    },
    512: {"XL/2": 524.60},
}  # fmt: skip
MILLION_PARAMETERS = {
    "S/8": 33, "S/4": 33, "S/2": 33,
    "B/8": 131, "B/4": 130, "B/2": 130,
    "L/8": 459, "L/4": 458, "L/2": 458,
    "XL/8": 676, "XL/4": 675, "XL/2": 675,
}  # fmt: skip


def gflops_report(sizes: tuple[int, ...] = SIZES) -> Report:
    """What is published (None where nothing is), our formula and torch's count."""
    from dit_bench.machine import describe
    from dit_bench.unet import NAME, PUBLISHED_GFLOPS, PUBLISHED_MILLIONS, unet_cost

    report = new_report("gflops", describe(torch.device("cpu")), {"source": SOURCE})
    rows = report["rows"]
    for size in sizes:
        for full in PUBLISHED:
            name = full.removeprefix("DiT-")
            config = ModelConfig.named(name, size)
            table = config.num_tokens * config.hidden_size  # the position table, not trained
            published = GFLOPS[size].get(name), MILLION_PARAMETERS[name]
            rows.append(_row(name, size, model_record(config), *published, untrained=table))
    rows += [
        _row("VAE decoder (Stable Diffusion)", size,
             {"parts": {}, "total": decoder_record(VAEConfig(), size // 8)}, None, None)
        for size in sizes
    ]  # fmt: skip
    try:
        cost = unet_cost()
    except ImportError as error:
        rows.append({"section": "cost", "case": NAME, "contender": "", "size": 256,
                     "status": "skipped", "reason": str(error)})  # fmt: skip
    else:
        total = {"parameters": cost.parameters, "macs": cost.macs, "flops": cost.flops,
                 "counted_flops": cost.flops}  # fmt: skip
        record = {"parts": {}, "total": total}
        rows.append(_row(NAME, 256, record, PUBLISHED_GFLOPS, PUBLISHED_MILLIONS))
    report["complete"] = True
    return report


def _row(
    name: str, size: int, record: dict[str, Any], gflops: float | None, millions: float | None,
    untrained: int = 0,
) -> Row:  # fmt: skip
    total = record["total"] | {"trained_parameters": record["total"]["parameters"] - untrained}
    return {
        "section": "cost", "case": name, "contender": "formula and torch's count", "status": "ok",
        "model": name, "size": size, "published_gflops": gflops,
        "published_million_parameters": millions, "parts": record["parts"], "total": total,
    }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--size", type=int, nargs="+", choices=SIZES, default=list(SIZES), help="pixels")
    add("--wide", action="store_true", help="all columns, wider than the terminal")
    add("--json", type=Path, nargs="?", const=STDOUT, metavar="FILE", help="as JSON")


def run(arguments: argparse.Namespace) -> int:
    from dit_bench.outputs import check_outputs
    from dit_bench.report import write
    from dit_bench.show.reports import report_tables
    from dit_bench.show.tables import show

    check_outputs([arguments.json])
    report = gflops_report(tuple(dict.fromkeys(arguments.size)))
    if arguments.json != STDOUT:
        show(report_tables(report), wide=arguments.wide)
    write(report, arguments.json)
    return 0
