"""The machine and the versions of a measurement."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dit_engine.io.printable import one_line
from dit_kernels import available

BUSY = 0.5
"""Load average above which a report of times says so; importing torch alone adds about 0.1."""
SETTLE_S = 180
"""The longest wait for what ran before, an installation say, to leave the load average."""
PACKAGES = (
    "numpy", "diffusers", "openvino", "onnxruntime", "tensorrt", "tensorrt-rtx", "triton",
    "tritonclient", "flash-attn", "flash-attn-4", "transformers",
)  # fmt: skip
INSTRUCTIONS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile",
    "amx_bf16", "amx_int8",
)  # fmt: skip
_CPUINFO = Path("/proc/cpuinfo")
_GPU_STATE = ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "power.limit",
              "temperature.gpu")  # fmt: skip
_SAMPLED = ("clocks.sm", "power.draw", "temperature.gpu", "clocks_throttle_reasons.active")
_SAMPLE_S = 0.2
THROTTLES = (
    "idle", "application clocks", "power cap", "hardware slowdown", "sync boost",
    "thermal (software)", "thermal (hardware)", "power brake", "display clocks",
)  # fmt: skip
"""The meanings of the lowest bits of NVML's clock event reasons, the lowest first."""


def describe(device: torch.device) -> dict[str, Any]:
    """The "machine" of a report."""
    found: dict[str, Any] = {
        "cpu": processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),  # see `wait_briefly`
        "platform": platform.platform(),
        "python": platform.python_version(),
        "instruction_sets": instruction_sets(),
        "versions": versions(),
        "kernels": available(),
    }
    return found | ({"cuda": describe_cuda(device)} if device.type == "cuda" else {})


def overview() -> dict[str, dict[str, Any]]:
    """What ``dit-bench --env`` shows: the machine by topic, and which backends work here."""
    from dit_bench.contenders import check_backend
    from dit_engine.backends import known_backends
    from dit_engine.io.printable import one_line
    from dit_engine.runtime import parse_device
    from dit_kernels.quantized import quantized_why_not

    device = parse_device(None)
    found = describe(device)
    hardware = {key: value for key, value in found.items() if isinstance(value, str | int)}
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    hardware["memory"] = f"{memory / 2**30:.1f} GiB"
    hardware["load average"] = f"{load_average() or 0:.2f}"
    hardware["instruction sets"] = " ".join(found["instruction_sets"]) or "unknown"
    products = {
        kind: quantized_why_not(kind, torch.device("cpu") if kind == "int8" else device) or "yes"
        for kind in ("int8", "fp8")
    }
    backends = dict.fromkeys((name for name in known_backends() if name != "auto"), "yes")
    for name in backends:
        try:
            check_backend(name, "fp32", device)
        except (ImportError, ValueError, RuntimeError, OSError) as error:  # noqa: PERF203
            backends[name] = one_line(error)
    return {"hardware": hardware, "versions": found["versions"], "kernels": found["kernels"],
            "quantised products": products, "backends": backends, **choices()}  # fmt: skip


def choices() -> dict[str, dict[str, str]]:
    """For each GPU model: part of a forward → the kernel that lean chose, with its time."""
    from dit_engine.backends.lean.choice_file import remembered
    from dit_kernels.chooser import quickest

    def told(times: dict[str, float | None]) -> str:
        default, name = next(iter(times)), quickest(times)
        of_default = "" if name == default else f" ({default} {times[default] or 0:.4f})"
        return f"{name} {times[name] or 0:.4f} ms{of_default}"

    return {
        f"chosen on {device}": {key: told(times) for key, times in known.items() if times}
        for device, known in remembered().items()
    } or {"chosen on CUDA": {"nothing": "none was measured yet"}}


def versions() -> dict[str, str]:
    """The versions of this project and of the installed packages among `PACKAGES`."""
    from dit_engine._version import __version__

    found = {"dit_engine": __version__, "torch": torch.__version__}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def instruction_sets(cpuinfo: str | None = None) -> list[str]:
    """The `INSTRUCTIONS` that the processor has; none if the system does not tell."""
    flags = _facts(cpuinfo).get("flags", "").split()
    return [name for name in INSTRUCTIONS if name in flags]


def cpu_model(cpuinfo: str | None = None) -> str:
    """The processor's name as the system gives it; cpuinfo: /proc/cpuinfo unless given."""
    return _facts(cpuinfo).get("model name") or platform.processor() or platform.machine()


def processor(cpuinfo: str | None = None) -> str:
    """`cpu_model`; if it has no model number, as in clouds, with the numbers that distinguish
    generations: "AMD EPYC" → "AMD EPYC (family 25, model 17)"."""
    name, facts = cpu_model(cpuinfo), _facts(cpuinfo)
    known = {"cpu family": "family", "model": "model", "CPU part": "part"}
    more = ", ".join(f"{said} {facts[key]}" for key, said in known.items() if key in facts)
    return f"{name} ({more})" if more and not re.search(r"\d{3}", name.split("@")[0]) else name


def same_processor(one: Any, other: Any) -> bool:
    """Whether two names may mean one processor. Older reports have names without family and model,
    or with the generation behind them, as in "AMD EPYC (family 25, model 17: Zen 4)"."""
    (a, more), (b, other_more) = (
        re.fullmatch(r"(.*?)(?: \(((?:family|part)[^():]*).*\))?", str(name), re.DOTALL).groups()  # pyright: ignore[reportOptionalMemberAccess]
        for name in (one, other)
    )
    return a == b and (more == other_more or None in (more, other_more))


def slug(name: str) -> str:
    """A processor's or device's name as part of a file name: "AMD EPYC 9B14" → "amd-epyc-9b14"."""
    plain = re.sub(r"\((r|tm)\)|@.*", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "unknown"


def _facts(cpuinfo: str | None) -> dict[str, str]:
    """What /proc/cpuinfo says about the first processor."""
    if cpuinfo is None:
        there = _CPUINFO.exists()
        cpuinfo = _CPUINFO.read_text(encoding="utf-8", errors="replace") if there else ""
    lines = (line.partition(":") for line in cpuinfo.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def describe_cuda(device: torch.device) -> dict[str, Any]:
    """The facts about a CUDA device; None for what neither torch nor nvidia-smi tells."""
    properties = torch.cuda.get_device_properties(device)
    found: dict[str, Any] = {
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "multiprocessors": getattr(properties, "multi_processor_count", None),
        "memory_bytes": getattr(properties, "total_memory", None),
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    try:
        answers: Sequence[str | None] = _nvidia_smi(device, _GPU_STATE)
    except (OSError, ValueError, subprocess.SubprocessError):
        answers = [None] * len(_GPU_STATE)
    return found | dict(zip(_GPU_STATE, answers, strict=True))


def _uuid(device: torch.device) -> str | None:
    """The device's name for NVML and nvidia-smi, whose device numbers may differ from torch's."""
    found = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return None if found is None else f"GPU-{str(found).removeprefix('GPU-')}"


def _nvidia_smi(device: torch.device, fields: Sequence[str]) -> list[str]:
    """The values of ``fields``. Raises OSError, ValueError or SubprocessError if one is missing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    if (uuid := _uuid(device)) is not None:
        command.append(f"--id={uuid}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    answers = [part.strip() for part in done.stdout.strip().split("\n")[0].split(",")]
    if len(answers) != len(fields):
        raise ValueError(f"nvidia-smi answers {one_line(done.stdout)[:100]!r}")
    return answers


def usable(device: torch.device) -> bool:
    """Whether the device still computes. After some errors this process can no longer use it."""
    try:
        return torch.ones(2, device=device).sum().item() == 2
    except RuntimeError:
        return False


class DeviceState:
    """Samples a GPU's clock (MHz), power (W), temperature (°C) and throttling through NVML (the
    package nvidia-ml-py) or else nvidia-smi; ``source`` is which, or why neither works."""

    def __init__(self, device: torch.device) -> None:
        self._read: Callable[[], tuple[float, ...]] | None = None
        reasons = []
        for name, make in (("NVML", _nvml_reader), ("nvidia-smi", _nvidia_smi_reader)):
            try:
                reader = make(device)
                reader()
            except Exception as error:  # NVML's errors have no common base class
                reasons.append(f"{name}: {type(error).__name__}: {one_line(error)[:80]}")
                continue
            self._read, self.source = reader, name
            return
        self.source = f"nothing ({'; '.join(reasons)})"

    @contextmanager
    def sampled(self) -> Iterator[dict[str, Any]]:
        """Samples while the block runs; the dict is filled at its end, or stays empty."""
        found: dict[str, Any] = {}
        if self._read is None:
            yield found
            return
        read, samples, end = self._read, list[tuple[float, ...]](), threading.Event()

        def collect() -> None:
            with suppress(Exception):  # earlier samples are kept
                while not end.is_set():
                    samples.append(read())
                    end.wait(_SAMPLE_S)

        thread = threading.Thread(target=collect, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            end.set()
            thread.join(5)
            if taken := [*samples]:  # a copy, because a thread that hangs may still add samples
                *columns, masks = zip(*taken, strict=True)
                for key, values in zip(("sm_mhz", "power_w", "celsius"), columns, strict=True):
                    found[key] = {"min": min(values), "median": statistics.median(values),
                                  "max": max(values)}  # fmt: skip
                bits = range(1, max(int(mask).bit_length() for mask in masks))  # 0: idle
                found["throttled"] = [
                    THROTTLES[i] if i < len(THROTTLES) else f"bit {i}"
                    for i in bits
                    if any(int(mask) >> i & 1 for mask in masks)
                ]


def _nvml_reader(device: torch.device) -> Callable[[], tuple[float, ...]]:
    import pynvml  # pyright: ignore[reportMissingImports]

    pynvml.nvmlInit()
    uuid = _uuid(device)
    handle = (pynvml.nvmlDeviceGetHandleByIndex(device.index or 0) if uuid is None
              else pynvml.nvmlDeviceGetHandleByUUID(uuid))  # fmt: skip
    reasons = getattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
    reasons = reasons or pynvml.nvmlDeviceGetCurrentClocksThrottleReasons
    return lambda: (
        float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
        float(reasons(handle)),
    )


def _nvidia_smi_reader(device: torch.device) -> Callable[[], tuple[float, ...]]:
    def read() -> tuple[float, ...]:
        *numbers, mask = _nvidia_smi(device, _SAMPLED)
        return (*map(float, numbers), float(int(mask, 16)))

    return read


def load_average() -> float | None:
    """The load average of the last minute; None if the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def settle(log: Callable[[str], object], longest: float = SETTLE_S) -> None:
    """Wait until the load average is that of an idle machine, at most ``longest`` seconds."""
    if (load_average() or 0) > BUSY:
        log(f"waiting for a load average of at most {BUSY}, {longest:.0f} s at most")
    waited = 0.0
    while waited < longest and (load_average() or 0) > BUSY:
        time.sleep(min(5.0, longest - waited))
        waited += 5.0
