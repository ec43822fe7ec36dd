"""The quantisation of one export: calibrated once, put into each graph, and measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dit_engine.backends.eager import placed
from dit_engine.model import DiT
from dit_export.onnx.calibration import calibrate, trajectory
from dit_export.onnx.graphs import exportable
from dit_export.onnx.qdq import QuantizedLinear, quantize
from dit_export.onnx.verify import relative_error, rms_error
from dit_export.targets import FLOATS

if TYPE_CHECKING:
    from dit_export.onnx.export import ExportOptions

_IMAGES, _STEPS, _FIRST_SEED = 4, 10, 1000  # of the paired trajectory; seeds that calibrate nothing


@dataclass(frozen=True)
class Quantization:
    """Attributes:
    ranges: largest magnitude of each quantised layer's input.
    scales: float dtype of the graphs around the quantised products.
    latents: {"relative", "rms"} of the latents after a guided trajectory of the quantised
        arithmetic, run in torch, against the same one of the model as it was.
    """

    kind: str
    ranges: dict[str, float]
    scales: torch.dtype
    unsigned: bool
    calibration: dict[str, Any]
    latents: dict[str, Any]

    @classmethod
    def of(cls, model: DiT, options: ExportOptions, float_dtype: str) -> Quantization:
        images, steps = options.calibration_images, options.calibration_steps
        exact = placed(model, torch.float32, torch.device("cpu"))
        made = cls(
            kind=options.dtype,
            ranges=calibrate(exact, images, steps),
            scales=FLOATS[float_dtype],
            unsigned=options.target != "tensorrt",
            calibration={"images": images, "steps": steps, "sampler": "dpm++"},
            latents={"images": _IMAGES, "steps": _STEPS, "sampler": "dpm++"},
        )
        expected = trajectory(exact, _IMAGES, _STEPS, _FIRST_SEED)
        actual = trajectory(made.twin(model), _IMAGES, _STEPS, _FIRST_SEED)
        made.latents["relative"] = relative_error(actual, expected)
        made.latents["rms"] = rms_error(actual, expected)
        return made

    def twin(self, model: DiT) -> DiT:
        """The model in float32 with the graphs' rounding."""

        def layer(name: str, linear: nn.Linear) -> nn.Module:
            return QuantizedLinear(linear, self.kind, self.ranges[name], self.scales)

        return exportable(model, torch.float32, layer)

    def apply(self, model: Any) -> None:
        """Put it into an onnx_ir Model, in place."""
        quantize(model, self.kind, self.ranges, self.scales, self.unsigned)

    def record(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "kind": self.kind,
            "weights": "symmetric, one scale an output channel",
            "activations": "symmetric, one scale a tensor",
            "calibration": self.calibration,
            "latents": self.latents,
            "input_ranges": self.ranges,
        }

    def __str__(self) -> str:
        latents = self.latents
        return (
            f"{self.kind}: latents after {latents['steps']} paired steps differ from the model's "
            f"by {latents['rms']:.1e} rms, {latents['relative']:.1e} at most"
        )
