"""Other ways to run the same network, each checked against float32 eager before it is timed.

A peer that is not installed, or that cannot run here, is skipped and named with the reason; one
whose result is wrong is not timed. All of them take and give float32 latents, as a sampler does.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dit_engine.checkpoint.convert import official_to_diffusers
from dit_engine.io.printable import one_line
from dit_engine.model import DiT

Function = Callable[[], Tensor]

# Relative errors (‖a − b‖ / ‖b‖) against float32 eager. In bf16 the order of rounding is each
# peer's own, so its bound is a multiple of what bf16 eager is off by.
FP32_BOUND = 1e-4
BF16_TIMES_EAGER = 4.0
INT8_BOUND = 0.1
FP8_BOUND = 0.25


@dataclass(frozen=True)
class Peer:
    """``build`` makes the function that is timed.

    precision: "fp32", "bf16", "int8", or None for what computes no network output (not checked).
    check: of what the function gave first, its error and the bound of it; None: the error is that
    of the tensor that it gave, the bound that of the precision.
    """

    name: str
    precision: str | None
    build: Callable[[], Callable[[], Any]]
    check: Callable[[Any], tuple[float, float]] | None = None


@dataclass
class Built:
    """The peers that may be timed, and what became of each one that was asked for."""

    functions: dict[str, Callable[[], Any]] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    def reason(self, name: str) -> str | None:
        """Why ``name`` is not timed, or None."""
        if name in self.functions:
            return None
        return self.records.get(name, {}).get("skipped", "not asked for")


def build_peers(
    peers: Sequence[Peer],
    expected: Tensor | None,
    bf16_error: float,
    log: Callable[[str], object] = print,
    bounds: Mapping[str, float] | None = None,
) -> Built:
    """Build each peer and compare its result with ``expected`` (float32 eager), or as it asks.

    bf16_error: relative error of bf16 eager, from which the bf16 bound comes.
    bounds: precision → allowed relative error, where it is another than usual.
    """
    bounds = error_bounds(bf16_error) | dict(bounds or {})
    built = Built()
    for peer in peers:
        start = time.perf_counter()
        record: dict[str, Any] = {}
        built.records[peer.name] = record
        try:
            with torch.inference_mode():
                function = peer.build()
                record["setup_s"] = round(time.perf_counter() - start, 3)
                output = function()
                _finish(output)
                record["build_s"] = round(time.perf_counter() - start, 2)
        # What a peer raises where it cannot run; anything else is a fault of this program.
        except (ImportError, ValueError, RuntimeError, OSError, MemoryError) as error:
            record["skipped"] = one_line(error)[:200] or type(error).__name__
            log(f"  {peer.name}: skipped: {record['skipped']}")
            continue
        if peer.precision is not None:
            if peer.check is None:
                assert expected is not None
                record["error"] = relative_error(output, expected)
                record["bound"] = bounds[peer.precision]
            else:
                with torch.inference_mode():
                    record["error"], record["bound"] = peer.check(output)
            text = f"error {record['error']:.2e}, bound {record['bound']:.2e}"
            if not record["error"] <= record["bound"]:  # NaN fails too
                record["skipped"] = f"computes another function ({text})"
                log(f"  {peer.name}: not timed: {record['skipped']}")
                continue
            log(f"  {peer.name}: {text}, built in {record['build_s']:.1f} s")
        built.functions[peer.name] = torch.inference_mode()(function)
    return built


def _finish(output: Any) -> None:
    """Wait for a CUDA device, which works on after a call has returned."""
    if isinstance(output, Tensor) and output.is_cuda:
        torch.cuda.synchronize(output.device)


def error_bounds(bf16_error: float) -> dict[str, float]:
    """Precision → the relative error that is allowed, from that of bf16 eager."""
    return {
        "fp32": FP32_BOUND,
        "bf16": max(FP32_BOUND, BF16_TIMES_EAGER * bf16_error),
        "int8": INT8_BOUND,
    }


def allowed_error(precision: str, bf16_error: float) -> float:
    """The relative error of one pass through a network that is allowed in ``precision``."""
    # float16 rounds eight times finer than bfloat16.
    fp16 = max(FP32_BOUND, BF16_TIMES_EAGER * bf16_error / 8)
    return (error_bounds(bf16_error) | {"fp16": fp16, "fp8": FP8_BOUND})[precision]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64. Raises ValueError where the shapes differ."""
    if actual.shape != expected.shape:
        raise ValueError(f"shapes {tuple(actual.shape)} and {tuple(expected.shape)} differ")
    a, b = actual.double(), expected.double()
    return ((a - b).norm() / b.norm()).item()


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Random weights in place, adaLN's too (at their initial zeros every block is the identity).

    Embedders are large, so that a wrong time step or label shows above the rounding of bf16.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name == "pos_embed":
            continue
        gain = 2.0 if name.startswith("t_embedder") else 0.5
        scale = gain * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        with torch.no_grad():
            parameter.normal_(std=1.0 if name.startswith("y_embedder") else scale,
                              generator=generator)  # fmt: skip


def diffusers_transformer(model: DiT) -> Any:
    """diffusers' DiTTransformer2DModel on the tensors of ``model``, which it shares.

    Raises ImportError without diffusers.
    """
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    config = model.config
    theirs: Any
    with torch.device("meta"):
        theirs = DiTTransformer2DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.hidden_size // config.num_heads,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.depth,
            sample_size=config.input_size,
            patch_size=config.patch_size,
            num_embeds_ada_norm=config.num_classes,
            norm_eps=config.mlp_norm_eps,
        )
    theirs.load_state_dict(diffusers_state(model.state_dict(), config.depth), assign=True)
    theirs.pos_embed.pos_embed = model.pos_embed.detach()
    return theirs.eval().requires_grad_(False)


def diffusers_state(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """diffusers' state dict of an official one, without copies: q, k and v are views of qkv."""
    theirs: dict[str, Tensor] = {}
    for official, names in official_to_diffusers(depth):
        theirs |= zip(names, state[official].chunk(len(names)), strict=True)
    first = "transformer_blocks.0.norm1.emb."
    embedders = {key: tensor for key, tensor in theirs.items() if key.startswith(first)}
    for i in range(1, depth):
        theirs |= {key.replace(".0.", f".{i}.", 1): tensor for key, tensor in embedders.items()}
    return theirs


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's one Core of this process, never given up.

    Each has a CPU plugin that sets the thread's stack for signals, and puts back what it found when
    it goes. Two that go in another order than they came leave memory there that is no more, and the
    process dies of the next Ctrl-C.
    """
    import openvino  # pyright: ignore[reportMissingImports]

    return openvino.Core()


def openvino_function(
    module: nn.Module, arguments: tuple[Tensor, ...], precision: str, threads: int
) -> Function:
    """``module`` (float32) for these very shapes under OpenVINO's CPU plugin.

    Raises ImportError without openvino, RuntimeError where it would run in another precision.
    """
    import openvino  # pyright: ignore[reportMissingImports]

    hint = {"fp32": "f32", "bf16": "bf16"}[precision]
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its exporter's parts
        converted = openvino.convert_model(torch.export.export(module, arguments))
    options = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino_core().compile_model(converted, "CPU", options)
    used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if used != hint:
        raise RuntimeError(f"OpenVINO runs {used} on this processor, not {hint}")
    request = compiled.create_infer_request()
    inputs = [argument.numpy() for argument in arguments]

    def run() -> Tensor:
        outputs = request.infer(inputs, share_inputs=True, share_outputs=True)
        return torch.from_numpy(outputs[0])

    return run
