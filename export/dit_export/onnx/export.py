"""ONNX graphs of a DiT and its VAE: written, checked and run before they get their final name."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_engine._version import __version__
from dit_engine.arguments import choice
from dit_engine.io.directories import check_destination, new_directory
from dit_engine.model import DiT
from dit_engine.plan import check_channels
from dit_engine.runtime import neutral
from dit_engine.sampling.guidance import OFFICIAL_CHANNELS
from dit_engine.vae import AutoencoderKL
from dit_export.bundle import LABELS, Bundle, Graph, replaceable, write_manifest
from dit_export.onnx.exporter import to_onnx
from dit_export.onnx.files import require_onnx, save
from dit_export.onnx.graphs import (
    LINEARS,
    MakeLayer,
    MatMulLinear,
    VAEDecoder,
    exportable,
    signature,
    transformer_graph,
)
from dit_export.onnx.quantization import calibrated, check_pairs
from dit_export.onnx.verify import verify_graph
from dit_export.source import model_name, weights_hash
from dit_export.targets import (
    FLOATS,
    GRAPHS,
    QUANTIZED,
    QUANTIZED_GRAPHS,
    VAE_GRAPH,
    choose_opset,
    float_dtype,
)

Report = Callable[[str], None]


@dataclass(frozen=True)
class ExportOptions:
    """What to write; see ``dit-export onnx --help``.

    Attributes:
        dtype: "fp32", "fp16", "bf16", or "int8" or "fp8", which quantise the blocks' linear layers.
        target: the runtime, which decides the opset and the dtype around quantised products.
        opset, graphs, vae_dtype: None means the best opset, all graphs that the model has, and
            "bf16" if dtype is "bf16", else "fp32".
        external_data_mib: a larger graph has its weights in a file of its own. A protobuf file may
            have at most 2 GiB, and writing it takes five times its size in memory, while weights
            are written one by one.
    """

    dtype: str = "fp16"
    target: str = "onnxruntime"
    opset: int | None = None
    graphs: tuple[str, ...] | None = None
    guided_channels: int = OFFICIAL_CHANNELS
    vae_dtype: str | None = None
    external_data_mib: int = 512
    calibration_images: int = 8
    calibration_steps: int = 8

    def checked(self) -> ExportOptions:
        """Returns these options; ValueError that names the first one out of its range."""
        choose_opset(self.dtype, self.target, self.opset)
        if self.graphs == ():
            raise ValueError(f"no graphs: choose some of {', '.join(GRAPHS)}")
        for graph in self.graphs or ():
            choice("graph", graph, GRAPHS)
        if self.vae_dtype is not None:
            choice("vae_dtype", self.vae_dtype, FLOATS)
        choose_opset(self.graph_dtype(VAE_GRAPH), self.target, self.opset)
        for name, least, most in (
            ("external_data_mib", 0, 2047),
            ("calibration_images", 1, 1_000_000),
            ("calibration_steps", 2, 1000),
        ):
            if not least <= (value := getattr(self, name)) <= most:
                raise ValueError(f"{name} {value}: allowed is {least} to {most}")
        return self

    def graph_dtype(self, name: str) -> str:
        if name == VAE_GRAPH:  # float16 overflows in Stable Diffusion's decoder
            return self.vae_dtype or ("bf16" if self.dtype == "bf16" else "fp32")
        quantized = name in QUANTIZED_GRAPHS
        return self.dtype if quantized else float_dtype(self.dtype, self.target)


@neutral()
def export_onnx(
    model: DiT,
    directory: str | Path,
    options: ExportOptions | None = None,
    *,
    vae: AutoencoderKL | None = None,
    label_names: tuple[str, ...] | None = None,
    overwrite: bool = False,
    report: Report = lambda _: None,
) -> Bundle:
    """Write an export directory (`dit_export.bundle`), whole or not at all.

    Every graph is checked by onnx, and run beside torch on random inputs. A graph whose error is
    above its bound makes the export fail.

    Args:
        model: in any dtype; it is not changed.
        overwrite: replace an earlier export; anything else in ``directory`` is refused.
        report: told one line for every graph.

    Raises:
        ValueError: an option out of its range, a graph that cannot be made, or a destination that
            holds something else.
        OSError: it cannot be written. ImportError: a package of the extra "onnx" is missing.
    """
    require_onnx()
    options = (options or ExportOptions()).checked()
    names = _graphs(options, model, vae)
    classes = model.config.num_classes
    if label_names is not None and len(label_names) != classes:
        raise ValueError(f"{len(label_names)} label names for {classes} classes")
    target, may_replace = Path(directory), replaceable(overwrite)
    check_destination(target, may_replace)
    facts: dict[str, Any] = {
        "model": model.config.to_dict(),
        "vae": None if vae is None else json.loads(vae.config.to_json()),
        "checkpoint": weights_hash(model),
        "vae_checkpoint": None if vae is None else weights_hash(vae),
        "dtype": options.dtype,
        "float_dtype": float_dtype(options.dtype, options.target),
        "opset": choose_opset(options.dtype, options.target, options.opset),
        "target": options.target,
        "guided_channels": options.guided_channels,
        "label_names": None if label_names is None else list(label_names),
    }
    with new_directory(target, may_replace) as partial:
        graphs = _write(partial, names, model, vae, options, facts, report)
        if label_names is not None:
            text = json.dumps(list(label_names), indent=2, ensure_ascii=False)
            (partial / LABELS).write_text(text + "\n", encoding="utf-8")
        write_manifest(partial, facts, graphs)
    return Bundle.open(target, verify=False)


def _graphs(options: ExportOptions, model: DiT, vae: AutoencoderKL | None) -> tuple[str, ...]:
    """The graphs to write, in the order of `GRAPHS`. Raises ValueError for one that was asked for
    and cannot be made."""
    check_channels(options.guided_channels, model.config.in_channels)
    asked, impossible = options.graphs or (), {}
    if vae is None:
        impossible[VAE_GRAPH] = "this model has no VAE; give one with --vae"
    if not model.config.has_null_class:
        impossible["guided_step"] = "this model has no null class to guide with"
    for name, reason in impossible.items():
        if name in asked:
            raise ValueError(f"graph {name!r}: {reason}")
    return tuple(g for g in GRAPHS if g in (asked or GRAPHS) and g not in impossible)


def _write(
    directory: Path,
    names: tuple[str, ...],
    model: DiT,
    vae: AutoencoderKL | None,
    options: ExportOptions,
    facts: dict[str, Any],
    report: Report,
) -> list[Graph]:
    """Write and verify one graph after the other, so that the memory of one is free before the
    next. The record of a quantisation is added to ``facts``."""
    inside, target = FLOATS[facts["float_dtype"]], options.target
    quantized, graphs = MatMulLinear, []
    if options.dtype in QUANTIZED and set(names) & set(QUANTIZED_GRAPHS):
        size = (options.calibration_images, options.calibration_steps)
        unsigned = target != "tensorrt"
        quantized, record = calibrated(model, options.dtype, inside, unsigned, *size)
        facts["quantization"], latents = record, record["latents"]
        report(
            f"{options.dtype}: latents after {latents['steps']} paired steps differ from the "
            f"model's by {latents['rms']:.1e} rms, {latents['relative']:.1e} at most"
        )

    def module(name: str, dtype: torch.dtype, layer: MakeLayer) -> nn.Module:
        if name == VAE_GRAPH:
            assert vae is not None
            return VAEDecoder(vae, dtype).eval()
        twin = exportable(model, dtype, layer)
        return transformer_graph(name, twin, options.guided_channels)

    for name in names:
        dtype, vaes = options.graph_dtype(name), name == VAE_GRAPH
        tensors = signature(name, model.config, None if vae is None else vae.config)
        graph = Graph(name, f"{name}.onnx", dtype, *tensors)
        layer = quantized if name in QUANTIZED_GRAPHS else MatMulLinear
        # Each graph has an opset of its own: TensorRT takes no Attention operator in float32, the
        # dtype of the VAE beside an fp16 transformer.
        opset = choose_opset(dtype, target, options.opset)
        made = module(name, FLOATS[dtype] if vaes else inside, layer)
        exported = to_onnx(made, graph, opset)
        if layer is not MatMulLinear:
            check_pairs(exported, name, len(LINEARS) * model.config.depth)
        exported.producer_name, exported.producer_version = "dit-engine", __version__
        exported.metadata_props.update(
            {
                "graph": name,
                "model": model_name(model.config),
                "dtype": dtype,
                "checkpoint": facts["vae_checkpoint" if vaes else "checkpoint"],
                "version": __version__,
            }
        )
        save(exported, directory / graph.file, options.external_data_mib)
        del made, exported
        gc.collect()
        # In float32, with the weights as they were before any rounding to the graph's dtype.
        graph = verify_graph(directory, graph, module(name, torch.float32, layer))
        graphs.append(graph)
        size = sum(file.stat().st_size for file in directory.glob(f"{graph.file}*"))
        error = graph.error or {}
        report(
            f"{name:12s} {dtype:5s} {size / 2**20:8.1f} MiB  error {error['relative']:.1e} "
            f"(bound {error['bound']:.0e}) against {error['against']}, by {graph.verified_by[-1]}"
        )
    return graphs
