"""int8 and fp8 (E4M3) for the blocks' linear layers: calibrated, put into the graphs, measured.

A graph holds pairs of QuantizeLinear and DequantizeLinear, from which TensorRT's strongly typed
mode takes its precisions, and which onnxruntime fuses into integer products. Everything is
symmetric: a weight has one scale per output channel, an activation one scale per tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dit_engine.backends.eager import placed
from dit_engine.model import DiT
from dit_engine.sampling.guidance import guided
from dit_engine.sampling.noise import PerImageNoise
from dit_engine.sampling.samplers import SAMPLERS
from dit_engine.sampling.schedule import make_schedule
from dit_export.bundle import ExportFailed
from dit_export.onnx.graphs import LINEARS, MakeLayer, exportable
from dit_export.onnx.verify import relative_error

LIMITS = {"int8": 127.0, "fp8": 448.0}
GUIDANCE_SCALE = 4.0
# The trajectory that measures the error; its seeds calibrate nothing.
_IMAGES, _STEPS, _FIRST_SEED = 4, 10, 1000


def calibrated(
    model: DiT, kind: str, scales: torch.dtype, unsigned: bool, images: int, steps: int
) -> tuple[MakeLayer, dict[str, Any]]:
    """What makes the replacement of a linear layer for `exportable`, and the manifest's record.

    The record's "latents" are the differences between this arithmetic and the model's own, after a
    guided trajectory in torch.

    Args:
        kind: "int8" or "fp8".
        scales: the float dtype of the graphs around the quantised products.
        unsigned: whether int8 activations are uint8 around 128: the same values, which x86
            multiplies by int8 weights in one instruction. TensorRT wants them around 0.
    """
    exact = placed(model, torch.float32, torch.device("cpu"))
    ranges = calibrate(exact, images, steps)

    def layer(name: str, linear: nn.Linear) -> QuantizedLinear:
        return QuantizedLinear(linear, kind, ranges[name], scales, unsigned)

    rounding = exportable(model, torch.float32, layer)
    expected, actual = (
        trajectory(twin, _IMAGES, _STEPS, _FIRST_SEED) for twin in (exact, rounding)
    )
    latents = {
        "relative": relative_error(actual, expected),
        "rms": ((actual - expected).norm() / expected.norm()).item(),
    }
    return layer, {
        "kind": kind,
        "weights": "symmetric, one scale an output channel",
        "activations": "symmetric, one scale a tensor",
        "calibration": {"images": images, "steps": steps, "sampler": "dpm++"},
        "latents": {"images": _IMAGES, "steps": _STEPS, "sampler": "dpm++"} | latents,
        "input_ranges": ranges,
    }


def check_pairs(model: Any, name: str, layers: int) -> None:
    """Raise ExportFailed if an optimiser has folded some of an onnx_ir Model's pairs."""
    found = sum(node.op_type == "DequantizeLinear" for node in model.graph)
    if found != 2 * layers:
        raise ExportFailed(
            f"{name}: {found} products' inputs are quantised, and not two for each of the {layers} "
            "linear layers"
        )


class QuantizedLinear(nn.Module):
    """A linear layer over tokens that rounds its weight and its input.

    An export writes it as ONNX operators. Called in torch, it computes the same in float32.
    """

    weight_codes: Tensor  # (in, out)
    weight_scale: Tensor  # (out,)
    input_scale: Tensor
    bias: Tensor

    def __init__(
        self, linear: nn.Linear, kind: str, reach: float, scales: torch.dtype, unsigned: bool
    ) -> None:
        super().__init__()
        self.kind = kind
        weight = linear.weight.detach().t().float()  # (in, out)
        weight_scale = scale_of(weight.abs().amax(0), kind, scales)
        codes = rounded(weight / weight_scale.float(), kind)
        zero = torch.zeros((), dtype=codes.dtype)
        if unsigned and kind == "int8":
            zero = torch.tensor(128, dtype=torch.uint8)
        tensors = {
            "input_scale": scale_of(torch.tensor(reach, dtype=torch.float32), kind, scales),
            "input_zero_point": zero,
            "weight_codes": codes.contiguous(),
            "weight_scale": weight_scale,
            "weight_zero_point": torch.zeros(len(weight_scale), dtype=codes.dtype),
            "bias": linear.bias.detach(),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, in) → (N, T, out)
        if not torch.compiler.is_exporting():
            scale = self.input_scale.float()
            x = rounded(x / scale, self.kind).float() * scale
            weight = self.weight_codes.float() * self.weight_scale.float()
            return torch.matmul(x, weight) + self.bias

        def operator(name: str, inputs: str, value: Tensor, dtype: torch.dtype, **axis: int):
            pair = [getattr(self, f"{inputs}_{kind}") for kind in ("scale", "zero_point")]
            return torch.onnx.ops.symbolic(
                name, (value, *pair), {**axis}, dtype=dtype, shape=value.shape
            )

        dtype = x.dtype  # which is that of the scales
        codes = operator("QuantizeLinear", "input", x, self.get_buffer("input_zero_point").dtype)
        x = operator("DequantizeLinear", "input", codes, dtype)
        weight = operator("DequantizeLinear", "weight", self.weight_codes, dtype, axis=1)
        return torch.matmul(x, weight) + self.bias


def scale_of(reach: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The scale for values up to ``reach``, in the dtype in which it is stored; it is at least the
    smallest normal number of float16."""
    return (reach / LIMITS[kind]).clamp(min=torch.finfo(torch.float16).tiny).to(dtype)


def rounded(x: Tensor, kind: str) -> Tensor:
    """x in units of its scale → codes (int8 or float8_e4m3fn); outliers are clipped."""
    x = x.clamp(-LIMITS[kind], LIMITS[kind])
    return x.round().to(torch.int8) if kind == "int8" else x.to(torch.float8_e4m3fn)


def trajectory(model: DiT, images: int, steps: int, first_seed: int = 0) -> Tensor:
    """Latents (N, C, S, S) of dpm++ sampling, guided if the model can be, with labels spread over
    all classes. The noise is that of the seeds first_seed, first_seed + 1, …

    model: on the CPU in float32.
    """
    config, cpu = model.config, torch.device("cpu")
    labels = torch.arange(images) * config.num_classes // images  # (N,)
    scales = torch.ones(images, dtype=torch.float64)
    if config.has_null_class:
        labels = torch.cat([labels, torch.full_like(labels, config.null_class)])  # (2N,)
        scales *= GUIDANCE_SCALE
    schedule = make_schedule(steps, SAMPLERS["dpm++"].spacing, config.diffusion)
    t = torch.tensor(schedule.timesteps)

    def denoiser(x: Tensor, step: int) -> Tensor:
        return model(x, t[step].expand(len(x)), labels[: len(x)])

    shape = (config.in_channels, config.input_size, config.input_size)
    noise = PerImageNoise(range(first_seed, first_seed + images), shape, cpu)
    with torch.inference_mode():
        return SAMPLERS["dpm++"].function(guided(denoiser, scales), noise.start(), schedule, noise)


def calibrate(model: DiT, images: int, steps: int) -> dict[str, float]:
    """The largest magnitude of the input of each linear layer of the blocks, during sampling.

    They are not clipped. Clipping the largest 1e-4 makes the grid finer for all others, but raised
    the built-in model's error in int8 from 0.85 to 1.2 % rms (in fp8 from 1.05 to 1.5 %).

    Raises ValueError for an activation that is not finite, which no scale can hold.
    """
    layers = {name: m for name, m in model.named_modules() if name.endswith(LINEARS)}
    ranges = dict.fromkeys(layers, torch.zeros(()))

    def watch(name: str):
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:  # maximum keeps a NaN
            ranges[name] = torch.maximum(ranges[name], inputs[0].abs().amax())

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        trajectory(model, images, steps)
    finally:
        for hook in hooks:
            hook.remove()
    for name, value in ranges.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"calibration: the input of {name} reaches {value.item()}")
    return {name: value.item() for name, value in ranges.items()}
