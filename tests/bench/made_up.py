"""A report of made-up figures, for tests of what is done with reports."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import numpy as np

from dit_bench.cost import decoder_record, model_record
from dit_bench.quality.features import Extracted, FeatureNetwork
from dit_bench.report import VERSION
from dit_engine.config import ModelConfig
from dit_engine.vae import VAEConfig

QUICK = ["--rounds", "3", "--seconds", "0.3", "--steps", "2", "--threads", "1", "--device", "cpu"]
MODELS = {"S/8": 4.0, "S/4": 10.0}  # milliseconds of a forward of one image by "lean bf16"
MACHINE = {
    "cpu": "a processor", "gpu": None, "device": "cpu", "threads": 2, "cpu_count": 4,
    "python": "3.11", "platform": "x", "versions": {"torch": "2.13"}, "instruction_sets": ["avx2"],
}  # fmt: skip


def colours(images: np.ndarray) -> Extracted:
    """Three pooled features, two spatial ones, five classes, each by a formula of its own."""
    pixels = images.astype(np.float32) / 255
    pooled = pixels.mean(axis=(1, 2))
    logits = np.concatenate([pooled * 5, pixels[:, 0, 0, :2]], axis=1).astype(np.float64)
    logarithms = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return Extracted(pooled, pixels[:, 1, 1, :2], logarithms.astype(np.float32))


COLOURS = FeatureNetwork("inception", "FID", 3, colours, 2, {"features": "inception"})


def report() -> dict[str, Any]:
    """Two models, forwards and steps of 1, 2 and 4 images by two contenders, and a U-Net."""
    return copy.deepcopy(_report())


@lru_cache(maxsize=1)
def _report() -> dict[str, Any]:
    models, rows = [], []
    for name, ms in MODELS.items():
        config = ModelConfig.named(name)
        cost = model_record(config)
        decoder = decoder_record(VAEConfig(), 32)
        models.append({"model": name, "weights": "random", "size": 256, "tokens": 1, "cost": cost,
                       "config": config.to_dict(), "decoder": decoder})  # fmt: skip
        gflops = cost["total"]["flops"] / 1e9
        for images in (1, 2, 4):
            for section, factor in (("forward", 1), ("step", 2)):
                time = ms * factor * images**0.5
                rows += [
                    row(name, section, images, "lean bf16", "subject", time,
                        gflops * images * factor),
                    row(name, section, images, "eager bf16", "peer", 2 * time, gflops * images),
                ]  # fmt: skip
        rows.append(row(name, "forward", 1, "LDM-4 U-Net bf16", "other network", 300.0, 208.45))
    rows.append({
        "section": "forward", "case": "S/4, batch 1", "contender": "openvino bf16", "role": "peer",
        "model": "S/4", "images": 1, "precision": "bf16", "status": "skipped",
        "reason": "no <such> processor",
    })  # fmt: skip
    return {
        "schema": VERSION, "kind": "models", "created": "2026-01-01T00:00:00+00:00",
        "command": ["--model", "S/8"], "machine": MACHINE,
        "settings": {
            "backend": "lean", "precision": "bf16", "rounds": 20, "seconds": 20.0, "steps": 20,
            "sampler": "ddpm", "noise_bound": 0.25,
        },
        "ceilings": {
            "copy_gb_s": 10.0, "matmul_tflop_s": {"fp32": 0.1, "bf16": 1.0}, "matmul_size": 1024,
            "copy_mib": 256, "missing": {"fp8": "none here"}, "measured": "before",
        },
        "load_average": 0.1, "models": models, "rows": rows, "complete": True,
    }  # fmt: skip


def row(
    model: str, section: str, images: int, name: str, role: str, ms: float, gflops: float
) -> dict[str, Any]:
    return {
        "section": section, "case": f"{model}, batch {images}", "contender": name, "role": role,
        "model": model, "size": 256, "images": images, "precision": "bf16", "status": "ok",
        "ms": spread(ms), "noisy": False, "samples_ms": [ms], "images_s": 1e3 * images / ms,
        "setup_s": 0.5, "first_call_s": 0.1, "gflops": gflops, "tflop_s": gflops / ms,
        "flops_per_byte": 20.0 * images,
    }  # fmt: skip


def spread(ms: float, width: float = 0.05) -> dict[str, float | int]:
    return {"p5": ms * (1 - width), "median": ms, "p95": ms * (1 + width), "n": 20}


def ratio(middle: float) -> dict[str, float]:
    return {"p5": middle * 0.95, "median": middle, "p95": middle * 1.05}


def operators() -> dict[str, Any]:
    """A report of the operators: one that multiplies, one that moves, two left out."""
    timed = {"section": "operator", "dtype": "bf16", "status": "ok", "role": "subject",
             "contender": "native", "shape": "N=2", "ms": spread(1.0), "percent_of_ceiling": 50.0,
             "speedup_over": {"eager": 2.0}}  # fmt: skip
    linear = timed | {"operator": "linear", "case": "linear N=2", "flops": 5e8, "bytes": 2e6,
                      "rate": 0.5, "unit": "TFLOP/s"}  # fmt: skip
    modulate = timed | {"operator": "layernorm_modulate", "case": "layernorm_modulate N=2",
                        "flops": 0, "bytes": 8e6, "rate": 8.0, "unit": "GB/s"}  # fmt: skip
    failed = {"section": "operator", "operator": "rope", "shape": "N=2", "dtype": "bf16",
              "case": "rope N=2", "contender": "native", "role": "subject", "status": "failed",
              "reason": "RuntimeError: broken"}  # fmt: skip
    rows = [linear, modulate, modulate | {"contender": "compile", "role": "peer"}, failed]
    return report() | {"kind": "operators", "rows": copy.deepcopy(rows), "models": []}


def parity() -> list[dict[str, Any]]:
    """Rows of parity: one backend with sets and a reference, one that equals eager, and one that
    gives NaN; in JSON the PSNR of both of the latter is null."""
    sets = {"metric": "FD-Lite0", "n": 2400, "between": 0.0123, "reference": "held-out",
            "n_reference": None, "to_reference": 76.81234, "eager_to_reference": 76.8,
            "difference": {"value": -0.0123, "low": -0.03, "high": 0.01},
            "absolute_difference": {"value": 0.0123, "low": 0.0, "high": 0.0312},
            "confidence": 0.95, "resamples": 100}  # fmt: skip
    same = {"section": "parity", "case": "builtin", "model": "builtin", "contender": "lean bf16",
            "role": "subject", "status": "ok", "backend": "lean", "precision": "bf16", "n": 2400,
            "settings": {"steps": 3}, "interrupted": False,
            "latent_error_by_step": [1e-3, 2e-3, 3e-3],
            "final_latent_error": {"mean": 3e-3, "max": 5e-3},
            "psnr_db": {"median": 41.25, "min": 30.0, "not_finite": 0}}  # fmt: skip
    equal = same | {"precision": "fp32", "contender": "lean fp32",
                    "psnr_db": {"median": float("inf"), "min": None, "not_finite": 0}}  # fmt: skip
    broken = same | {"precision": "fp16", "contender": "lean fp16",
                     "latent_error_by_step": [1e-3, float("nan"), None],
                     "final_latent_error": {"mean": float("nan"), "max": None},
                     "psnr_db": {"median": float("nan"), "min": None, "not_finite": 3}}  # fmt: skip
    return copy.deepcopy([same | {"sets": sets}, equal, broken])


def scaling() -> dict[str, Any]:
    """A report of the study of scaling."""
    rows = [
        {"section": "scaling", "case": name, "contender": f"{steps} steps",
         "status": "ok", "gmacs": gmacs,
         "steps": steps, "distance": 100 / gmacs - steps / 100, "n": 2400}
        for name, gmacs in (("DiT small/4", 0.5), ("DiT small/2", 2.0), ("U-Net", 4.0))
        for steps in (1500, 3000)
    ]  # fmt: skip
    return report() | {"kind": "scaling", "settings": {"metric": "FD-Lite0"}, "rows": rows}


def gpu() -> dict[str, Any]:
    """The report of a GPU run with every kind of row, in which 13 operators failed."""
    state = {"sm_mhz": spread3(1500, 1980), "power_w": spread3(80.5, 700.0),
             "celsius": spread3(35, 61), "throttled": ["power cap"]}  # fmt: skip
    own, rows = {"status": "ok", "device_state": state}, list[dict[str, Any]]()
    names = ("lean bf16", "lean fp8", "eager bf16", "graph bf16", "autotuned blocks graph bf16")
    work = {"step": (32, 1), "forward": (64, 2), "image": (1, 8, 32), "decode": (1, 8)}
    for model in ("XL/2", "S/2", "B/2", "L/2"):
        for section in work if model == "XL/2" else ("step",):
            for images in work[section]:
                for i, name in enumerate(names if section == "forward" else names[:3]):
                    made = row(model, section, images, name, "peer" if i else "subject",
                               1.25 * images * (i + 1), 118.0 * images)  # fmt: skip
                    rows.append(made | own | {"percent_of_matmul": 81.0})
    for images in (32, 1):
        parts = [{"part": f"kernel_{i}", "ms": 1.0 / (i + 1), "share": 0.2 / (i + 1), "count": 28}
                 for i in range(20)]  # fmt: skip
        rows.append(own | {"section": "kernels", "case": f"XL/2, batch {images}", "images": images,
                           "contender": "lean bf16", "role": "subject", "precision": "bf16",
                           "ms": {"median": 24.5}, "launches": 201, "shares": parts})  # fmt: skip
    one = operators()["rows"][0] | own | {"error_over_reference": 1.1, "error": 1e-3}
    for k in range(18):
        for lead in ("N=64", "N=2"):
            shape = f"{lead} T=256 D={k}"
            for name, role in (("triton 128x64", "subject"), ("triton-tma", "subject"),
                               ("compile", "peer")):  # fmt: skip
                rows.append(one | {"case": f"linear {shape}", "shape": shape, "contender": name,
                                   "role": role})  # fmt: skip
    broken = one | {"status": "failed", "contender": "triton"}
    rows += [broken | {"case": f"attention N={n}", "reason":
             f"CompilationError: at {min(n, 11)}: {'source ' * 30}(rows.py:{n}, launch.py:1)"}
             for n in range(13)]  # fmt: skip
    machine = MACHINE | {"gpu": "NVIDIA H200", "device": "cuda", "cuda": {"driver_version": "580"},
                         "versions": {"torch": "2.11.0", "triton": "3.6.0"}}  # fmt: skip
    ceilings = report()["ceilings"] | {"measured": "sustained for 2 s in"}
    return report() | {"kind": "gpu", "machine": machine, "settings": {"minutes": 8.0},
                       "rows": rows, "ceilings": ceilings, "parts_done": []}  # fmt: skip


def spread3(low: float, high: float) -> dict[str, float]:
    return {"min": low, "median": (low + high) / 2, "max": high}
