"""Contenders: who does a piece of work, and the check that each must pass before it is timed.

The reference is eager torch in float32 on the same weights and inputs. A contender that cannot run
here is skipped and named with the reason; one that computes another function is not timed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_engine.backends import PRECISIONS, create_backend, known_backends, resolve_backend
from dit_engine.config import ModelConfig
from dit_engine.errors import BackendUnavailable
from dit_engine.io.printable import one_line
from dit_engine.model import DiT

CPU = torch.device("cpu")
Function = Callable[[], Any]
Name = tuple[str, str]
"""A backend or a peer, and a precision."""

LIBRARIES = ("diffusers", "openvino", "unet")
"""Peers that are not backends of the engine."""
FORMS = ("compile frozen", "compile blocks", "autotune", "graph")
"""Other ways to run the reference model, which the CPU and GPU runs add (`dit_bench.peers`)."""

# Relative errors (‖a − b‖ / ‖b‖) against float32 eager. In bf16 each contender
# rounds in its own order, so its bound is a multiple of the error of bf16 eager.
FP32_BOUND = 1e-4
BF16_TIMES_EAGER = 4.0
INT8_BOUND = 0.1
FP8_BOUND = 0.25


@dataclass(frozen=True)
class Contender:
    """``build`` makes the function that is timed.

    Attributes:
        role: as in a report (`dit_bench.report`). There is nothing with which the result of a part
            of the work, or of another network, could be compared.
        precision: of its numbers.
        check: result → (error, bound), in place of the comparison with the expected result.
        flops: of one call, one multiply-add counted as two.
        weight_bytes: of one pass over the weights that every call needs.
    """

    name: str
    role: str
    precision: str
    build: Callable[[], Function]
    check: Callable[[Any], tuple[float, float]] | None = None
    flops: int = 0
    weight_bytes: int = 0


@dataclass
class Built:
    """The contenders that may be timed, and a record of each: "setup_s", "first_call_s", "error",
    "bound", and why it was left out ("reason"). On CUDA also the memory: "built_mib" that its
    building took, and "peak_mib", the peak up to the end of its first call."""

    functions: dict[str, Function] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)


def build(
    contenders: Sequence[Contender],
    expected: Tensor | None,
    bf16_error: float,
    log: Callable[[str], object] = print,
    device: torch.device = CPU,
) -> Built:
    """Build each contender and compare its first result with ``expected``, or by its ``check``.

    OpenVINO goes first, because its conversion needs the most memory.

    bf16_error: relative error of bf16 eager, from which the bounds in half precision come.
    """
    built = Built()
    for contender in sorted(contenders, key=lambda c: not c.name.startswith("openvino")):
        record = built.records[contender.name] = dict[str, Any]()
        try:
            with torch.inference_mode():
                function, output, found = _built(contender, device)
        # Raised by a contender that cannot run here. Other exceptions are faults of this program.
        except (ImportError, ValueError, RuntimeError, OSError, MemoryError) as error:
            record["reason"] = one_line(error)[:200] or type(error).__name__
            log(f"  {contender.name}: skipped: {record['reason']}")
            continue
        record |= found
        if contender.role in ("subject", "peer"):
            if contender.check is not None:
                with torch.inference_mode():
                    record["error"], record["bound"] = contender.check(output)
            else:
                assert expected is not None
                record["error"] = relative_error(output, expected)
                record["bound"] = allowed_error(contender.precision, bf16_error)
            text = f"error {record['error']:.2e}, bound {record['bound']:.2e}"
            if not record["error"] <= record["bound"]:  # NaN fails too
                record["reason"] = f"computes another function ({text})"
                log(f"  {contender.name}: not timed: {record['reason']}")
                continue
            log(f"  {contender.name}: {text}, built in {record['setup_s']} s")
        built.functions[contender.name] = torch.inference_mode()(function)
    return built


def _built(contender: Contender, device: torch.device) -> tuple[Function, Any, dict[str, float]]:
    """The function, the result of its first call, and what building and calling it cost."""
    cuda, start = device.type == "cuda", time.perf_counter()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    function = contender.build()
    ready = time.perf_counter()
    taken = torch.cuda.memory_allocated(device) if cuda else 0
    output = function()
    if cuda:
        torch.cuda.synchronize(device)
    record = {"setup_s": ready - start, "first_call_s": time.perf_counter() - ready}
    if cuda:
        peak = torch.cuda.max_memory_allocated(device)
        record |= {"built_mib": (taken - before) / 2**20, "peak_mib": (peak - before) / 2**20}
    return function, output, {key: round(value, 3) for key, value in record.items()}


def allowed_error(precision: str, bf16_error: float) -> float:
    """The relative error of one pass through a network that is allowed in ``precision``."""
    half = BF16_TIMES_EAGER * bf16_error
    return {
        "fp32": FP32_BOUND,
        "bf16": max(FP32_BOUND, half),
        "fp16": max(FP32_BOUND, half / 8),  # float16 rounds eight times finer than bfloat16
        "int8": INT8_BOUND,
        "fp8": FP8_BOUND,
    }[precision]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64. Raises ValueError if the shapes differ."""
    if actual.shape != expected.shape:
        raise ValueError(f"shapes {tuple(actual.shape)} and {tuple(expected.shape)} differ")
    a, b = actual.double(), expected.double()
    return ((a - b).norm() / b.norm()).item()


def parse_peers(text: str, precision: str) -> list[Name]:
    """ "diffusers,onnxruntime/fp32" → names with their precisions, ``precision`` unless given.

    If ``precision`` is quantised, peers have that of its activations. Raises ValueError.
    """
    usual = "bf16" if precision in ("int8", "fp8") else precision
    found: dict[Name, None] = {}
    for part in text.split(","):
        name, _, own = part.strip().partition("/")
        try:
            resolved = name if name in LIBRARIES else resolve_backend(name)
        except ValueError:
            known = ", ".join([*LIBRARIES, *(each for each in known_backends() if each != "auto")])
            raise ValueError(f"peer {name!r} is unknown; choose among {known}") from None
        if own and own not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise ValueError(f"peer {part!r}: precision {own!r} is none of {known}")
        found[resolved, own or usual] = None
    return list(found)


def check_backend(name: str, precision: str, device: torch.device) -> None:
    """Raise the backend's error if it cannot run here, before a large model is made for it. Its
    warnings are dropped, because it repeats them for that model."""
    with torch.device("meta"):
        model = DiT(ModelConfig(1, 64, 1, 2, 8, num_classes=1)).eval().requires_grad_(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            create_backend(name, model, precision, device)
    except (BackendUnavailable, ImportError, ValueError, OSError):
        raise
    except Exception:  # it got as far as the weights, and this model has none
        return


def float_dtype(precision: str) -> torch.dtype:
    """The dtype of the activations: bfloat16 between quantised products."""
    return {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)
