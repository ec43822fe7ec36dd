"""``dit-bench gflops``: the paper's twelve models beside our count, the decoder and the U-Net."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dit_bench.counted import decoder_record, model_record
from dit_bench.published import GFLOPS_256, GFLOPS_512, MILLION_PARAMETERS, SOURCE
from dit_bench.show.tables import Table
from dit_engine.config import PUBLISHED, ModelConfig
from dit_engine.vae import VAEConfig

SIZES = (256, 512)


def gflops_report(sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    """Rows as JSON: what is published (None where nothing is), our formula and torch's count."""
    rows = []
    for size in sizes:
        published = {256: GFLOPS_256, 512: GFLOPS_512}.get(size, {})
        for full in PUBLISHED:
            name = full.removeprefix("DiT-")
            config = ModelConfig.named(name, size)
            record = model_record(config)
            table = config.num_tokens * config.hidden_size  # the position table, not trained
            record["total"]["trained_parameters"] = record["total"]["parameters"] - table
            rows.append({
                "network": name, "size": size, "published_gflops": published.get(name),
                "published_million_parameters": MILLION_PARAMETERS[name], **record,
            })  # fmt: skip
    for size in sizes:
        record = decoder_record(VAEConfig(), size // 8)
        rows.append(_row("VAE decoder (Stable Diffusion)", size, record, None, None))
    return {"source": SOURCE, "rows": [*rows, _unet()]}


def _unet() -> dict[str, Any]:
    from dit_bench.unet import NAME, PUBLISHED_GFLOPS, PUBLISHED_MILLIONS, unet_cost

    try:
        cost = unet_cost()
    except ImportError as error:
        return {"network": NAME, "size": 256, "skipped": str(error)}
    record = {"parameters": cost.parameters, "macs": cost.macs, "flops": cost.flops,
              "counted_flops": cost.flops}  # fmt: skip
    return _row(NAME, 256, record, PUBLISHED_GFLOPS, PUBLISHED_MILLIONS)


def _row(
    name: str, size: int, record: dict[str, Any], gflops: float | None, millions: float | None
) -> dict[str, Any]:
    return {
        "network": name, "size": size, "published_gflops": gflops,
        "published_million_parameters": millions, "parts": {},
        "total": record | {"trained_parameters": record["parameters"]},
    }  # fmt: skip


def gflops_table(report: dict[str, Any]) -> Table:
    columns = ["network", "px", "paper M", "ours M", "paper Gflops", "ours (MACs)", "torch (MACs)",
               "true GFLOPs", "adaLN", "attention", "MLP"]  # fmt: skip
    table = Table("What the paper calls Gflops are multiply-adds (MACs), here in 10⁹", columns)
    table.short = ("network", "px", "ours M", "paper Gflops", "ours (MACs)", "torch (MACs)")
    for row in report["rows"]:
        if "skipped" in row:
            table.add(row["network"], row["size"], f"skipped: {row['skipped']}")
            continue
        total = row["total"]
        shares = [
            f"{row['parts'][part]['macs'] / total['macs']:.1%}" if row["parts"] else ""
            for part in ("adaln", "attention", "mlp")
        ]
        paper, millions = row["published_gflops"], row["published_million_parameters"]
        table.add(
            row["network"], row["size"],
            "–" if millions is None else f"{millions:.0f}",
            f"{total['trained_parameters'] / 1e6:.1f}",
            "–" if paper is None else f"{paper:.2f}",
            f"{total['macs'] / 1e9:.2f}", f"{total['counted_flops'] / 2e9:.2f}",
            f"{total['flops'] / 1e9:.2f}", *shares,
        )  # fmt: skip
    table.notes.append(f"paper: {report['source']}; parameters without the fixed position table")
    table.notes.append("ours: by formula, but for the U-Net, which torch alone has counted")
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--size", type=int, nargs="+", choices=SIZES, default=list(SIZES), help="pixels")
    add("--wide", action="store_true", help="all columns, wider than the terminal")
    add("--json", type=Path, nargs="?", const=Path("-"), metavar="FILE", help="as JSON")


def run(arguments: argparse.Namespace) -> int:
    from dit_bench.outputs import check_outputs, write_json
    from dit_bench.show.tables import show

    check_outputs([arguments.json])
    report = gflops_report(tuple(dict.fromkeys(arguments.size)))
    if arguments.json != Path("-"):
        show([gflops_table(report)], wide=arguments.wide)
    write_json(report, arguments.json)
    return 0
