"""What ``dit-bench gpu`` checks, and how it compiles all kernels beforehand.

The tests that need a GPU run in processes of their own beside the other checks: every operator at
XL/2's shapes against float64, every contender's forward against eager float32, and whether an image
is the same alone, in a batch and in another order. On a GPU nothing promises that its bits are the
same, because libraries choose a product's kernel by its number of rows: the difference is told, and
it is wrong if it is more than rounding could make it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch

from dit_bench.contenders import Contender, build, failed, relative_error
from dit_bench.report import Report, Row
from dit_bench.speed import operators
from dit_bench.speed.forward import Networks, Work
from dit_bench.speed.generation import AGAIN_BOUND
from dit_bench.speed.latency import Timer, reference
from dit_bench.speed.operator_cases import all_cases, implementations, ragged_cases
from dit_bench.subjects import load_subject, random_model, random_vae
from dit_engine.backends.lean.vae import LeanDecoder
from dit_engine.config import ModelConfig
from dit_engine.engine import Engine
from dit_engine.io.printable import one_line
from dit_engine.vae import VAEConfig

ROOT = Path(__file__).resolve().parents[3]
CORES = os.cpu_count() or 1
NAMES = (("lean", "fp32"), ("lean", "bf16"), ("lean", "fp8"), ("eager", "bf16"), ("graph", "bf16"))
IMAGES = 8
FLOAT32_AGAIN = 1e-3
"""Relative difference of an image's latents in float32 after four steps; in other precisions,
where guidance enlarges what rounding does, `AGAIN_BOUND`."""
ROWS = (2, 64)
ENDED = "the tests had to be ended"


def groups(device: torch.device, sizes: Sequence[str], report: Report) -> Iterator[Any]:
    """The parts of a check, as `dit_bench.speed.gpu.groups` gives those of a run."""
    rows, tests = report["rows"], GpuTests("the GPU's tests" not in report["parts_done"])

    def case_part(case: Any, timer: Timer) -> None:
        assert timer.budget is not None
        with torch.inference_mode():
            operators.measure([case], report, device, timer.budget, None)

    opened: dict[str, Networks] = {}

    def networks() -> Networks:
        if not opened:
            subject = load_subject(sizes[0], with_vae=False)
            opened[""] = Networks(Engine(subject.model, device=device))
        return opened[""]

    yield 0.7, [(case.title, partial(case_part, case)) for case in all_cases(device)]
    yield 0.9, [
        *((f"forwards of {n}, {m} rows", lambda timer, m=m: rows.extend(
            forward_rows(sizes[0], networks(), m, timer))) for n in sizes[:1] for m in ROWS),
        *((f"images of {n}, {p}", lambda _, p=p: rows.append(image_row(networks().engine, p)))
          for n in sizes[:1] for p in ("fp32", "bf16", "fp8")),
    ]  # fmt: skip
    yield 1.0, [("the GPU's tests", lambda timer: rows.extend(tests.rows(timer)))]


def forward_rows(model: str, networks: Networks, images: int, timer: Timer) -> Iterator[Row]:
    work = Work(networks, images)
    found = [Contender(f"{name} {precision}", "subject" if name == "lean" else "peer", precision,
                       partial(work.forward, name, precision))
             for name, precision in NAMES]  # fmt: skip
    expected = reference(work.forward, found)
    built = build(found, *expected, lambda _: None, timer.device, timer.budget)
    for contender in found:
        yield {"section": "check", "case": f"forward of {model}, {images} rows",
               "role": contender.role, "contender": contender.name,
               **built.records[contender.name]}  # fmt: skip


def image_row(engine: Engine, precision: str) -> Row:
    """Images alone and in another order beside the same ones in a batch."""
    row: Row = {"section": "check", "case": f"images alone and in a batch of {IMAGES}",
                "role": "subject", "contender": f"lean {precision}"}  # fmt: skip
    labels = [i % engine.config.num_classes for i in range(IMAGES)]
    seeds = [i + 7 for i in range(IMAGES)]

    def make(order: Sequence[int]) -> torch.Tensor:
        return engine.generate(
            [labels[i] for i in order],
            seeds=[seeds[i] for i in order],
            steps=4,
            backend="lean",
            precision=precision,
            output="latent",
        ).images

    try:
        together = make(range(IMAGES))
        others = {"alone": torch.cat([make([i]) for i in range(IMAGES)]),
                  "in another order": make(range(IMAGES)[::-1]).flip(0)}  # fmt: skip
    except Exception as broken:  # Triton's errors, say, are of no common class
        return row | failed(broken)
    errors = {how: relative_error(other, together) for how, other in others.items()}
    told = ", ".join(
        f"{how}: {'same bits' if torch.equal(other, together) else f'off by {errors[how]:.1e}'}"
        for how, other in others.items()
    )
    bound, worst = FLOAT32_AGAIN if precision == "fp32" else AGAIN_BOUND, max(errors.values())
    row |= {"error": worst, "bound": bound, "remark": told}
    return row | ({"status": "ok"} if worst <= bound else {"status": "wrong", "reason": told})


class GpuTests:
    """The tests that need a GPU, begun in the background. start: whether they are still needed."""

    running: subprocess.Popen[bytes] | None = None

    def __init__(self, start: bool = True) -> None:
        needed = ("pytest", "xdist")
        files = [str(path) for path in sorted((ROOT / "tests").glob("*/test_*.py"))
                 if "mark.gpu" in path.read_text(encoding="utf-8")]  # fmt: skip
        missing = [f"{name} is not installed" for name in needed if find_spec(name) is None]
        self.why_not = "; ".join(missing if files else [f"no tests in {ROOT}"])
        self.output = Path(tempfile.mkdtemp(prefix="dit-bench-")) / "tests.txt"
        if self.why_not or not start:
            return
        packages = [str(ROOT / name) for name in ("", "kernels", "export", "benchmarks")]
        path = os.pathsep.join([*packages, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "pytest", *files, "-m", "gpu", "-v", "-n",
                   str(max(1, CORES // 3)), "--dist", "worksteal", "--tb", "short", "--color", "no",
                   "-p", "no:cacheprovider"]  # fmt: skip
        with self.output.open("wb") as output:
            GpuTests.running = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": path, "COLUMNS": "400"}, cwd=ROOT,
                start_new_session=True,
            )  # fmt: skip

    def rows(self, timer: Timer) -> list[Row]:
        """Waits until they end or the time is up; a row for each failure, and one for the rest."""
        row: Row = {"section": "check", "case": "tests on the GPU", "role": "subject",
                    "contender": "pytest"}  # fmt: skip
        process = GpuTests.running
        if process is None:
            return [row | {"status": "skipped", "reason": self.why_not}]
        assert timer.budget is not None
        code: int | None = None
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(timer.budget.left())
        if code is None:
            process.send_signal(signal.SIGINT)  # it then still tells why tests failed
            with suppress(subprocess.TimeoutExpired):
                process.wait(8)
        end_tests()
        text = self.output.read_text(encoding="utf-8", errors="replace")
        counts, failures = outcomes(text)
        told = ", ".join(f"{n} {word.lower()}" for word, n in counts.items()) or one_line(
            text[-300:]
        )
        found = [row | {"contender": name, "status": "failed", "reason": reason[:300]}
                 for name, reason in failures.items()]  # fmt: skip
        if code is None:
            found.append(row | {"status": "late", "reason": f"{ENDED}; until then {told}"})
        elif code == 0 or (code == 1 and failures):
            found.append(row | {"status": "ok", "remark": told})
        else:
            found.append(row | {"status": "failed", "reason": f"pytest ended with {code}: {told}"})
        return found


def outcomes(text: str) -> tuple[Counter[str], dict[str, str]]:
    """From the output of pytest -v -n: how many tests passed and so on; failed test → reason."""
    counts, failures = Counter[str](), dict[str, str]()
    for line in text.splitlines():
        if told := re.match(r"\[gw\d+\] \[ *\d+%\] ([A-Z]+) (\S.*\S)", line):
            counts[told[1]] += 1
            if told[1] in ("FAILED", "ERROR"):
                failures.setdefault(told[2].strip(), "no reason was told")
        elif told := re.match(r"(?:FAILED|ERROR) (\S.*?)(?: - (.*))?$", line):
            failures[told[1]] = told[2] or "no reason was told"
    return counts, failures


def end_tests() -> None:
    """End the tests that may still run, with their workers."""
    process, GpuTests.running = GpuTests.running, None
    if process is not None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def only_compiling(workers: int, device: torch.device) -> Iterator[list[Any]]:
    """In this block, Triton's kernels are compiled where they would be launched, on ``workers``
    threads, and are not run. At its end the list holds what was compiled, ready to be launched; a
    kernel that cannot be compiled or loaded will say so when it is launched."""
    from triton.runtime import _async_compile, jit

    launch: Any = jit.JITFunction.run
    kernels: list[Any] = []

    def compile_only(self: Any, *given: Any, **options: Any) -> Any:
        return launch(self, *given, **options | {"warmup": True})

    def loaded(kernel: Any) -> Any:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return kernel.run  # Triton 3.6 compiles a launcher in C here

    with ThreadPoolExecutor(workers) as pool:
        mode = _async_compile.AsyncCompileMode(pool, ignore_errors=True)
        jit.JITFunction.run = compile_only
        try:
            with mode:
                yield kernels
        finally:
            jit.JITFunction.run = launch
        compiled = [each.result() for each in mode.raw_futures if each.exception() is None]
        ready = [pool.submit(loaded, kernel) for kernel in compiled]
        kernels += [kernel for kernel, each in zip(compiled, ready, strict=True)
                    if each.exception() is None]  # fmt: skip


def compile_kernels(device: torch.device, sizes: Sequence[str], report: Report) -> None:
    """Compile what the check and the run launch: every candidate of every operator, and the steps
    and decoders of models with one block. What goes wrong here goes wrong again where it counts."""
    if device.type != "cuda":
        return
    start, before = time.perf_counter(), os.environ.get("DIT_KERNELS_CHOOSE")
    os.environ["DIT_KERNELS_CHOOSE"] = "0"  # nothing can be measured where nothing runs
    row: Row = {"section": "check", "case": "kernels compiled beforehand", "role": "part",
                "contender": "triton"}  # fmt: skip
    try:
        with only_compiling(max(1, CORES - CORES // 3), device) as kernels:
            for call in launches(device, sizes):
                with suppress(Exception):
                    call()
        told = f"{len(kernels)} in {time.perf_counter() - start:.0f} s"
        report["rows"].append(row | {"status": "ok", "remark": told})
    except Exception as broken:  # they are then compiled one by one
        report["rows"].append(row | failed(broken))
    finally:
        os.environ.pop("DIT_KERNELS_CHOOSE")
        if before is not None:
            os.environ["DIT_KERNELS_CHOOSE"] = before


def launches(device: torch.device, sizes: Sequence[str]) -> Iterator[Callable[[], object]]:
    for case in (*all_cases(device), *ragged_cases()):
        arguments = case.inputs(device)
        for make in implementations(case, device).values():
            yield lambda make=make, given=arguments: make(*given)()
    vae = random_vae(VAEConfig())
    decoder = LeanDecoder(vae, torch.bfloat16, device)
    for images in (1, 8, 32):
        yield partial(decoder, torch.zeros(images, 4, 32, 32, device=device))
    for size in sizes:
        model = random_model(replace(ModelConfig.named(size, 256), depth=1))
        engine = Engine(model, device=device)
        for precision, rows in product(("bf16", "fp8", "fp32"), ROWS):
            yield partial(engine.generate, [0] * (rows // 2), steps=1, backend="lean",
                          precision=precision, output="latent")  # fmt: skip
