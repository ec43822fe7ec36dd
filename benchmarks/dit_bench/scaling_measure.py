"""The measuring half of `dit_bench.scaling`: FD-Lite0 of every network against its Gflops."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dit_bench.hardware import describe_hardware
from dit_bench.quality.fd_lite0 import METRIC, recognised
from dit_bench.quality.frechet import frechet_distance, moments_of
from dit_bench.quality.held_out import Features, Halves, load_halves
from dit_bench.quality.lite0 import extract, load_lite0
from dit_engine.backends.lean.vae import LeanDecoder
from dit_engine.checkpoint.weights import load_into
from dit_engine.console.bars import Bar
from dit_engine.decode import LatentDecoder, to_uint8
from dit_engine.io.files import atomic_path
from dit_engine.io.json_files import check_schema, read_json_value
from dit_engine.io.printable import show_plainly
from dit_engine.sampling.noise import PerImageNoise
from dit_engine.sampling.samplers import SAMPLERS
from dit_engine.sampling.schedule import make_schedule
from dit_engine.training.loop import kept_path
from dit_engine.vae import AutoencoderKL

SAMPLER, SAMPLING_STEPS, SPACING = "dpm++", 25, "linspace"
CHUNK = 64  # images sampled at once
_ROW = {
    "network": "text", "steps": "count", "gmacs": "positive", "parameters?": "count",
    "distance": "number", "n": "count", "n_reference?": "count", "recognised?": "number",
}  # fmt: skip


def sample(network: nn.Module, labels: Sequence[int], seeds: Sequence[int], size: int) -> Tensor:
    """Latents (N, 4, size, size) without guidance, as the paper's figures have it; image i starts
    from ``seeds[i]``'s noise whatever the network."""
    schedule = make_schedule(SAMPLING_STEPS, SPACING)
    y = torch.tensor(labels)
    timesteps = torch.tensor(schedule.timesteps.copy())
    noise = PerImageNoise(seeds, (4, size, size), torch.device("cpu"))

    def denoise(z: Tensor, k: int) -> Tensor:
        x = z.to(torch.bfloat16)
        return network(x, timesteps[k].expand(len(z)), y).to(z.dtype)

    with torch.inference_mode():
        z = noise.start()
        return SAMPLERS[SAMPLER].function(denoise, z, schedule, noise, lambda *_: None)


def features_of(
    network: nn.Module, labels: Sequence[int], size: int, decode: LatentDecoder, extractor: Any
) -> Features:
    """(N, 1280) of one image a label, from seeds 0, 1, …"""
    parts = []
    for start in Bar(range(0, len(labels), CHUNK), "sampling"):
        part = labels[start : start + CHUNK]
        z = sample(network, part, range(start, start + len(part)), size)
        parts.append(extract(to_uint8(decode(z, "bf16", LeanDecoder)), extractor))
    return np.concatenate(parts)


def macs_of(network: nn.Module, size: int) -> int:
    """Multiply-adds of one forward of one image, by torch's operator counting."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    # The fused attention of CPUs is not among the operators that are counted.
    with counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        network(torch.zeros(1, 4, size, size), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops() // 2


def measure(
    made: dict[str, Callable[[], nn.Module]],
    folders: dict[str, Path],
    steps: Sequence[int],
    vae: AutoencoderKL,
    data: Path,
    samples: int,
    kept: Path,
    num_classes: int,
) -> dict[str, Any]:
    """One row a network and number of steps; those in ``kept`` are not measured again.

    Args:
        folders: network → its directory, which holds `kept_path`'s files.
        samples: of each row, a multiple of the number of classes.
    """
    size = _input_size(made)
    network_of_features = load_lite0()
    halves: Halves | None = None
    rows = read_rows(kept) if kept.is_file() else []
    done = {(row["network"], row["steps"], row["n"]) for row in rows}
    decode = LatentDecoder(vae, torch.device("cpu"))
    for name, make in made.items():
        for step in steps:
            path = kept_path(folders[name], step)
            if not path.is_file():
                raise ValueError(f"{path} does not exist: train {name!r} for {max(steps)} steps")
            if (name, step, samples) in done:
                continue
            if halves is None:
                halves = load_halves(
                    data,
                    samples // num_classes,
                    size * vae.config.downsampling,
                    network_of_features,
                )
            network = make()
            macs = macs_of(network, size)
            load_into(network, path)
            network.to(torch.bfloat16).eval().requires_grad_(False)
            features = features_of(
                network, halves.labels.tolist(), size, decode, network_of_features
            )
            reference = moments_of(halves.features_b)
            hits = recognised(features, halves.labels, halves.features_a, halves.labels)
            rows.append(
                {
                    "network": name,
                    "steps": step,
                    "gmacs": macs / 1e9,
                    "parameters": sum(p.numel() for p in network.parameters()),
                    "distance": frechet_distance(moments_of(features), reference),
                    "n": len(features),
                    "n_reference": reference.count,
                    "recognised": float(hits.mean()),
                }
            )
            with atomic_path(kept) as partial:
                partial.write_text(json.dumps(rows, indent=2))
    return {
        "metric": METRIC,
        "points": rows,
        "sampling": {"sampler": SAMPLER, "steps": SAMPLING_STEPS, "spacing": SPACING,
                     "guidance_scale": 1.0, "precision": "bf16"},
        "training_seeds": 1,
        "hardware": describe_hardware(),
    }  # fmt: skip


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that `measure` wrote. Raises a one-line ValueError with the path for other files."""
    rows = read_json_value(path)
    check_schema({"rows": rows}, {"": {"rows": "list"}, "rows[]": _ROW}, path)
    return rows


def _input_size(made: dict[str, Callable[[], nn.Module]]) -> int:
    from dit_engine.model import DiT

    for make in made.values():
        network = make()
        if isinstance(network, DiT):
            return network.config.input_size
    raise ValueError("no DiT among the networks")


def orders(rows: Sequence[dict[str, Any]], steps: int) -> list[tuple[str, float, float]]:
    """(network, Gflops, distance) of the DiTs at ``steps``, by Gflops: the claim is that the last
    column falls."""
    chosen = [r for r in rows if r["steps"] == steps and r["network"].startswith("DiT")]
    found = [(r["network"], r["gmacs"], r["distance"]) for r in chosen]
    return sorted(found, key=lambda row: row[1])


def plot(report: dict[str, Any], path: Path) -> None:
    """The paper's figure: distance against Gflops, a line for each number of training steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = report["points"]
    figure, axis = plt.subplots(figsize=(6, 4))
    for steps in sorted({row["steps"] for row in rows}):
        found = orders(rows, steps)
        (line,) = axis.plot(
            [g for _, g, _ in found], [d for _, _, d in found], "o-", label=f"DiT, {steps} steps"
        )
        for name, gflops, distance in found:
            axis.annotate(name.removeprefix("DiT "), (gflops, distance), xytext=(4, 5),
                          textcoords="offset points", fontsize=8)  # fmt: skip
        for row in rows:
            if row["steps"] == steps and not row["network"].startswith("DiT"):
                axis.plot(row["gmacs"], row["distance"], "s", color=line.get_color(),
                          mfc="white", label=f"{row['network']}, {steps} steps")  # fmt: skip
    axis.set(xscale="log", xlabel="Gflops (multiply-adds) of a forward", ylabel=report["metric"])
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlim(right=1.6 * max(row["gmacs"] for row in rows))  # room for the last one's name
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    show_plainly(figure).tight_layout()
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    plt.close(figure)
