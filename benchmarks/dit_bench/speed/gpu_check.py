"""What ``dit-bench gpu --check`` checks, and how ``dit-bench gpu`` compiles all kernels beforehand.

The tests that need a GPU run in other processes at the same time as these checks: every operator at
XL/2's shapes against float64, every contender's forward against eager float32, and images made
alone and in another order against the same images made in one batch. On a GPU the bits of an image
may depend on its batch, because libraries choose the kernel of a product by its number of rows. The
check reports the difference and fails if rounding cannot explain it.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch

import torch

from dit_bench.contenders import Contender, build, failed, relative_error
from dit_bench.report import Report, Row
from dit_bench.speed import operators
from dit_bench.speed.forward import Networks, Work
from dit_bench.speed.generation import AGAIN_BOUND
from dit_bench.speed.latency import Timer, reference
from dit_bench.speed.operator_cases import all_cases, implementations, ragged_cases
from dit_bench.subjects import load_subject, random_model, random_vae
from dit_engine.backends.lean import choices
from dit_engine.backends.lean.backend import LeanBackend
from dit_engine.backends.lean.vae import LeanDecoder
from dit_engine.config import ModelConfig
from dit_engine.engine import Engine
from dit_engine.io.printable import one_line
from dit_engine.vae import VAEConfig
from dit_kernels.triton.compiling import only_compiling

ROOT = Path(__file__).resolve().parents[3]
CORES = os.cpu_count() or 1
PRECISIONS = ("bf16", "fp8", "fp32")
IMAGES, ROWS = 8, (2, 64)
FLOAT32_AGAIN = 1e-3
"""Largest allowed relative difference of an image's latents in float32 after four steps. In other
precisions guidance enlarges rounding errors, and `AGAIN_BOUND` is allowed."""
SUMMARY_SECONDS = 8.0
"""Time for pytest to print why tests failed after it was interrupted."""


def groups(device: torch.device, sizes: Sequence[str], report: Report) -> Iterator[Any]:
    """The parts of a check, as `dit_bench.speed.gpu.groups` gives those of a run."""
    rows, tests = report["rows"], "the GPU's tests"
    if tests not in report["parts_done"]:
        GpuTests.start()

    def operator(case: Any, timer: Timer) -> None:
        assert timer.budget is not None
        with torch.inference_mode():
            operators.measure([case], report, device, timer.budget, None, progress=timer.progress)

    @cache
    def networks(name: str) -> Networks:
        return Networks(Engine(load_subject(name, with_vae=False).model, device=device))

    def forward(name: str, images: int, timer: Timer) -> None:
        rows.extend(forward_rows(name, Work(networks(name), images), timer))

    def images(name: str, precision: str, timer: Timer) -> None:
        rows.append(image_row(networks(name).engine, precision))

    yield 0.7, [(case.title, partial(operator, case)) for case in all_cases(device)]
    yield 0.9, [(f"forward of {n}, {m}", partial(forward, n, m)) for n in sizes[:1] for m in ROWS]
    yield 0.9, [(f"images of {n}, {p}", partial(images, n, p))
                for n in sizes[:1] for p in PRECISIONS]  # fmt: skip
    yield 1.0, [(tests, lambda timer: rows.extend(GpuTests.rows(timer)))]


def forward_rows(model: str, work: Work, timer: Timer) -> Iterator[Row]:
    """A row per contender: its forward against eager float32, checked and not timed."""
    names = [*(("lean", precision) for precision in PRECISIONS), ("eager", "bf16"),
             ("graph", "bf16")]  # fmt: skip
    found = [Contender(f"{name} {precision}", "subject" if name == "lean" else "peer", precision,
                       partial(work.forward, name, precision))
             for name, precision in names]  # fmt: skip
    expected = reference(work.forward, found)
    built = build(found, *expected, lambda _: None, timer.device, timer.budget)
    for contender in found:
        yield {"section": "check", "case": f"forward of {model}, {work.images} rows",
               "role": contender.role, "contender": contender.name,
               **built.records[contender.name]}  # fmt: skip


def image_row(engine: Engine, precision: str) -> Row:
    """Compares images made alone and in another order with the same images made in one batch."""

    def make(order: Sequence[int]) -> torch.Tensor:
        classes = [i % engine.config.num_classes for i in order]
        return engine.generate(classes, seeds=[i + 7 for i in order], steps=4, backend="lean",
                               precision=precision, output="latent").images  # fmt: skip

    together = make(range(IMAGES))
    others = {"alone": torch.cat([make([i]) for i in range(IMAGES)]),
              "in another order": make(range(IMAGES)[::-1]).flip(0)}  # fmt: skip
    errors = {how: relative_error(other, together) for how, other in others.items()}
    same = {how: torch.equal(other, together) for how, other in others.items()}
    told = ", ".join(f"{how}: {'same bits' if same[how] else f'off by {error:.1e}'}"
                     for how, error in errors.items())  # fmt: skip
    bound, worst = FLOAT32_AGAIN if precision == "fp32" else AGAIN_BOUND, max(errors.values())
    return {
        "section": "check", "case": f"images alone and in a batch of {IMAGES}", "role": "subject",
        "contender": f"lean {precision}", "error": worst, "bound": bound, "remark": told,
        "status": "ok" if worst <= bound else "wrong", "reason": told,
    }  # fmt: skip


class GpuTests:
    """Runs the tests that need a GPU in the background, in one pytest process for this program."""

    process: subprocess.Popen[bytes] | None = None
    output: IO[bytes]
    why_not = ""

    @classmethod
    def start(cls) -> None:
        files = [str(path) for path in sorted((ROOT / "tests").glob("*/test_*.py"))
                 if "mark.gpu" in path.read_text(encoding="utf-8")]  # fmt: skip
        missing = [name for name in ("pytest", "xdist") if find_spec(name) is None]
        cls.why_not = f"{', '.join(missing)} not installed" if missing else f"no tests in {ROOT}"
        if missing or not files:
            return
        cls.output = tempfile.TemporaryFile()  # noqa: SIM115 - `rows` closes it
        packages = [str(ROOT / name) for name in ("", "kernels", "export", "benchmarks")]
        path = os.pathsep.join([*packages, *filter(None, [os.environ.get("PYTHONPATH")])])
        options = ["-m", "gpu", "-v", "--tb", "short", "--color", "no", "-p", "no:cacheprovider",
                   "-n", str(max(1, CORES * 3 // 4)), "--dist", "worksteal"]  # fmt: skip
        cls.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *files, *options], cwd=ROOT, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=cls.output, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path, "COLUMNS": "400"},
        )  # fmt: skip

    @classmethod
    def rows(cls, timer: Timer) -> Iterator[Row]:
        """Wait until the tests end or time is up: a row for each failure and one for the rest."""
        row: Row = {"section": "check", "case": "tests on the GPU", "role": "subject",
                    "contender": "pytest"}  # fmt: skip
        if cls.process is None:
            yield row | {"status": "skipped", "reason": cls.why_not}
            return
        assert timer.budget is not None
        code: int | None = None
        with suppress(subprocess.TimeoutExpired):
            code = cls.process.wait(max(0.0, timer.budget.left() - SUMMARY_SECONDS))
        if code is None:
            cls.process.send_signal(signal.SIGINT)  # pytest then prints why tests failed
            with suppress(subprocess.TimeoutExpired):
                cls.process.wait(SUMMARY_SECONDS)
        cls.end()
        cls.output.seek(0)
        with cls.output:
            text = cls.output.read().decode(errors="replace")
        counts, failures = outcomes(text)
        for name, reason in failures.items():
            yield row | {"contender": name, "status": "failed", "reason": reason[:300]}
        told = ", ".join(f"{n} {word.lower()}" for word, n in counts.items())
        if code is None:
            yield row | {"status": "late", "reason": f"had to be ended; until then {told}"}
        elif code == 0 or (code == 1 and failures):
            yield row | {"status": "ok", "remark": told}
        else:
            said = f"pytest ended with {code}: {told or one_line(text[-300:])}"
            yield row | {"status": "failed", "reason": said}

    @classmethod
    def end(cls) -> None:
        """Kill pytest and its workers if they still run."""
        process, cls.process = cls.process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def outcomes(text: str) -> tuple[Counter[str], dict[str, str]]:
    """From the output of ``pytest -v -n``: (outcome → number of tests, failed test → reason)."""
    counts, failures = Counter[str](), dict[str, str]()
    for line in text.splitlines():
        if told := re.match(r"\[gw\d+\] \[ *\d+%\] ([A-Z]+) (\S.*\S)", line):
            counts[told[1]] += 1
            if told[1] in ("FAILED", "ERROR"):
                failures[told[2]] = "no reason was told"
        elif told := re.match(r"(?:FAILED|ERROR) (\S.*)", line):
            known = (name for name in failures if told[1].startswith(name))
            name = next(known, told[1].partition(" - ")[0])
            failures[name] = told[1].removeprefix(name).removeprefix(" - ")
    return counts, failures


def compile_kernels(device: torch.device, calls: Iterable[Callable[[], object]]) -> Row:
    """Compile the kernels that ``calls`` launch, without running them; return a row with the count.

    Errors are ignored here, because they occur again when the kernel is checked. Nothing is chosen
    by measurement, because nothing runs.
    """
    row: Row = {"section": "check", "case": "kernels compiled beforehand", "role": "part",
                "contender": "triton"}  # fmt: skip
    if device.type != "cuda":
        return row | {"status": "skipped", "reason": f"{device} has no kernels to compile"}
    start = time.perf_counter()
    try:
        with (patch.dict(os.environ, DIT_KERNELS_CHOOSE="0"),
              only_compiling(CORES, device) as kernels):  # fmt: skip
            for call in calls:
                with suppress(Exception):
                    call()
    except Exception as broken:  # kernels are then compiled when they are first launched
        return row | failed(broken)
    told = f"{len(kernels)} in {time.perf_counter() - start:.0f} s"
    return row | {"status": "ok", "remark": told}


def operator_calls(device: torch.device) -> Iterator[Callable[[], object]]:
    """Calls of every candidate of every operator, and of the VAE's decoder."""
    for case in (*all_cases(device), *ragged_cases()):
        arguments = case.inputs(device)
        for make in implementations(case, device).values():
            yield lambda make=make, given=arguments: make(*given)()
    decoder = LeanDecoder(random_vae(VAEConfig()), torch.bfloat16, device)
    for images in (1, 8):
        yield partial(decoder, torch.zeros(images, 4, 32, 32, device=device))


def model_calls(device: torch.device, sizes: Iterable[str]) -> Iterator[Callable[[], object]]:
    """Steps of models cut to one block, and calls of every candidate of their parts."""
    for size in sizes:
        model = random_model(replace(ModelConfig.named(size, 256), depth=1))
        engine = Engine(model, device=device)
        for precision, rows in product(PRECISIONS, ROWS):
            yield partial(engine.generate, [0] * (rows // 2), steps=1, backend="lean",
                          precision=precision, output="latent")  # fmt: skip
            yield partial(call_candidates, engine, precision, rows)


def call_candidates(engine: Engine, precision: str, rows: int) -> None:
    """Call the candidates that the lean forward would measure for ``rows`` rows; ignore errors."""
    backend = engine._backend("lean", precision)
    assert isinstance(backend, LeanBackend)
    for part, ways in choices.candidates(backend.transformer, rows).items():
        example = choices.Example(backend.transformer, part, rows)
        for way in ways.values():
            with suppress(Exception):
                example.call(way)
