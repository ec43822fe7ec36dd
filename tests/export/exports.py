"""Small exports that several tests read; each is made once a test run."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
import torch
from tiny import NAMES, tiny_dit, tiny_vae
from torch import Tensor

from dit_engine.vae import AutoencoderKL
from dit_export.bundle import MANIFEST, Bundle
from dit_export.onnx.export import ExportOptions, export_onnx

_KEPT: list[TemporaryDirectory[str]] = []


@cache
def exported(dtype: str, *graphs: str, target: str = "onnxruntime", **options: Any) -> Bundle:
    """An export of `tiny_dit` and `random_vae`, removed when the tests end."""
    folder = TemporaryDirectory()
    _KEPT.append(folder)
    made = ExportOptions(dtype, target, graphs=graphs or None, **options)
    vae = random_vae() if not graphs or "vae_decoder" in graphs else None
    return export_onnx(tiny_dit(), Path(folder.name) / "out", made, vae=vae, label_names=NAMES)


def quantized(dtype: str, target: str) -> Bundle:
    """A denoiser, and the conditioner with it for onnxruntime."""
    graphs = ("conditioner", "denoiser") if target == "onnxruntime" else ("denoiser",)
    return exported(dtype, *graphs, target=target, calibration_images=2, calibration_steps=3)


def random_vae() -> AutoencoderKL:
    """With norms that are not all alike: equal weights would be stored as one."""
    vae = tiny_vae()
    generator = torch.Generator().manual_seed(3)
    for parameter in vae.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return vae


def run(bundle: Bundle, graph: str, **inputs: Tensor | np.ndarray) -> list[Tensor]:
    """The graph's outputs, by an onnxruntime session with nothing of ours in it."""
    session = onnxruntime.InferenceSession(
        str(bundle.file(graph)), providers=["CPUExecutionProvider"]
    )
    outputs = session.run(None, {name: np.asarray(value) for name, value in inputs.items()})
    return [torch.from_numpy(output) for output in outputs]


def manifest(bundle: Bundle) -> dict[str, Any]:
    return json.loads((bundle.path / MANIFEST).read_text(encoding="utf-8"))
