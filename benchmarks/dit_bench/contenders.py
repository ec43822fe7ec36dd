"""Contenders: who does a piece of work, and the check that each must pass before it is timed.

The reference is eager torch in float32 on the same weights and inputs. A contender that cannot run
here is skipped and named with the reason; one that computes another function is not timed.
"""

from __future__ import annotations

import math
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_bench.timing import Budget
from dit_engine.backends import PRECISIONS, create_backend, known_backends, resolve_backend
from dit_engine.config import ModelConfig
from dit_engine.errors import BackendUnavailable
from dit_engine.io.printable import one_line
from dit_engine.model import DiT
from dit_engine.runtime import bfloat16_why_not, is_out_of_memory
from dit_kernels import Unavailable

CPU = torch.device("cpu")
Function = Callable[[], Any]
Name = tuple[str, str]
"""A backend or a peer, and a precision."""

LIBRARIES = ("diffusers", "openvino", "unet")
"""Peers that are not backends of the engine."""
FORMS = ("compile frozen", "autotuned blocks graph", "graph")
"""Other ways to run the reference model, which the CPU and GPU runs add (`dit_bench.peers`)."""
COMPILE_SECONDS = {"autotuned blocks graph": 60.0, "compile": 90.0, "compile vae": 45.0}
"""What must be left of a time budget for them to be begun: a compilation cannot be cut short."""

# Relative errors (`relative_error`) against float32 eager. In low precision the order of rounding
# is each contender's own, so its bound is a multiple of what bf16 eager is off by. Of published
# sizes and the built-in model, errors of at most 3e-6 were measured in float32, and of 1.0 times
# eager's in bf16 (lean, diffusers, OpenVINO, torch.compile), 1.4 times in int8, and 3.5 times in
# emulated fp8.
FP32_BOUND = 1e-4
BF16_TIMES_EAGER = 2.0
QUANTISED_TIMES_EAGER = 8.0
INT8_BOUND, FP8_BOUND = 0.1, 0.25
"""Where eager bf16 itself is far off, a quantised contender may not be further off than this."""


CANNOT_RUN = (ImportError, ValueError, OSError, MemoryError, BackendUnavailable, Unavailable)
"""What is raised by what is not installed or cannot run on this machine."""


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
        seconds: what must be left of a time budget for it to be begun.
    """

    name: str
    role: str
    precision: str
    build: Callable[[], Function]
    check: Callable[[Any], tuple[float, float]] | None = None
    flops: int = 0
    weight_bytes: int = 0
    seconds: float = 0.0


@dataclass
class Built:
    """The contenders that may be timed, and what became of each one: its "status" as in a report,
    "setup_s", "first_call_s", "error" and "bound", and why it was left out ("reason"). Of the
    subject on CUDA also "built_mib", which its building took, and "peak_mib", the most until its
    first call ended."""

    functions: dict[str, Function] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)


def build(
    contenders: Sequence[Contender],
    expected: Tensor | None,
    bf16_error: float,
    log: Callable[[str], object] = print,
    device: torch.device = CPU,
    budget: Budget | None = None,
) -> Built:
    """Build each contender and compare its first result with ``expected``, or by its ``check``.

    OpenVINO goes first, because its conversion needs the most memory. A subject that breaks, and
    does not just say that it cannot run here, has failed.

    bf16_error: relative error of bf16 eager, from which the bounds in half precision come.
    """
    built = Built()
    for contender in sorted(contenders, key=lambda c: not c.name.startswith("openvino")):
        record: dict[str, Any] = {"status": "skipped"}
        built.records[contender.name] = record
        if budget is not None and budget.left() <= contender.seconds:
            record["reason"] = "no time was left"
            continue
        try:
            with torch.inference_mode():
                function, output, found = _built(contender, device)
                record |= found
                if contender.role in ("subject", "peer"):
                    record |= _checked(contender, output, expected, bf16_error)
        except Exception as error:  # whatever one dies of, the others are still measured
            cannot = isinstance(error, CANNOT_RUN) or is_out_of_memory(error)
            record |= failed(error)
            if cannot:
                record["reason"] = one_line(error)[:200] or type(error).__name__
            if contender.role == "peer" or cannot:
                record["status"] = "skipped"
            log(f"  {contender.name}: {record['status']}: {record['reason']}")
            continue
        if "reason" in record:
            log(f"  {contender.name}: not timed: {record['reason']}")
            continue
        record["status"] = "ok"
        if "error" in record:
            log(f"  {contender.name}: {_text(record)}, built in {record['setup_s']} s")
        built.functions[contender.name] = torch.inference_mode()(function)
    return built


def failed(error: BaseException) -> dict[str, str]:
    """The "status" and "reason" of a row after ``error``: its type, message and lines of code.

    A long message may begin with a kernel's source or a compiler's command, so its beginning and
    its end are kept.
    """
    said = one_line(error)
    if len(said) > 300:
        said = f"{said[:120]} … {said[-180:]}"
    frames = traceback.extract_tb(error.__traceback__)[:-4:-1]
    where = ", ".join(f"{Path(each.filename).name}:{each.lineno}" for each in frames)
    return {"status": "failed", "reason": f"{type(error).__name__}: {said} ({where})"}


def _checked(
    contender: Contender, output: Any, expected: Tensor | None, bf16_error: float
) -> dict[str, Any]:
    record: dict[str, Any] = {}
    if contender.check is not None:
        record["error"], record["bound"] = contender.check(output)
    else:
        assert expected is not None
        record["bound"] = allowed_error(contender.precision, bf16_error)
        same = output.shape == expected.shape
        record["error"] = relative_error(output, expected) if same else math.inf
    if not record["error"] <= record["bound"]:  # NaN fails too
        record |= {"status": "wrong", "reason": f"computes another function ({_text(record)})"}
    return record


def _text(record: dict[str, Any]) -> str:
    return f"error {record['error']:.2e}, bound {record['bound']:.2e}"


def _built(contender: Contender, device: torch.device) -> tuple[Function, Any, dict[str, float]]:
    """The function, the result of its first call, and what building and calling it cost."""
    cuda, start = device.type == "cuda", time.perf_counter()
    # Peers share tensors with the reference, so that of them too little would be seen.
    watched = cuda and contender.role == "subject"
    if watched:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if watched else 0
    function = contender.build()
    ready = time.perf_counter()
    taken = torch.cuda.memory_allocated(device) if watched else 0
    output = function()
    if cuda:
        torch.cuda.synchronize(device)
    record = {"setup_s": ready - start, "first_call_s": time.perf_counter() - ready}
    if watched:
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
        "int8": max(FP32_BOUND, min(INT8_BOUND, QUANTISED_TIMES_EAGER * bf16_error)),
        "fp8": max(FP32_BOUND, min(FP8_BOUND, QUANTISED_TIMES_EAGER * bf16_error)),
    }[precision]


def bf16_eager(errors: Callable[[str], Any], device: torch.device) -> Any:
    """``errors`` of eager "bf16". On a GPU without bfloat16 it is eight times that of eager "fp16",
    whose rounding is eight times finer."""
    return errors("bf16") if bfloat16_why_not(device) is None else 8 * errors("fp16")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64, of the worst row: one wrong image among many
    must show. NaN where any row has it. Raises ValueError where the shapes differ."""
    if actual.shape != expected.shape:
        raise ValueError(f"shapes {tuple(actual.shape)} and {tuple(expected.shape)} differ")
    a, b = (each.double().reshape(len(expected), -1) for each in (actual, expected))
    return ((a - b).norm(dim=1) / b.norm(dim=1)).max().item()


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
