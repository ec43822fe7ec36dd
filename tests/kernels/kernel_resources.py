"""What every Triton kernel needs on every GPU: registers, shared memory, matrix instructions.

``python tests/kernels/kernel_resources.py`` compiles, without a GPU, what the launchers launch, and
prints one line per kernel. Compare its output before and after a change of a kernel or of Triton.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

# Compute capability → bytes of shared memory that a block may have (CUDA C++ Programming Guide,
# table of technical specifications). 8.6 has 8.9's limits and no instructions of its own.
SHARED_MEMORY = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
PROCESSORS = 132
ROW_KERNELS = ("layernorm_modulate", "gate_residual_layernorm_modulate", "gate_residual")
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
}


class Case(NamedTuple):
    """One call of a launcher, compiled for one compute capability."""

    operator: str
    capability: int
    dtype: torch.dtype
    sizes: tuple[int, ...]  # as `arguments_of` takes them
    codes: torch.dtype | None = None

    @property
    def name(self) -> str:
        types = [TYPES[t] for t in (self.dtype, self.codes) if t is not None]
        sizes = "x".join(map(str, self.sizes))
        return f"sm_{self.capability} {self.operator} {sizes} {' '.join(types)}"


class Resources(NamedTuple):
    registers: int  # a thread
    shared_bytes: int
    spills: int  # instructions that move registers to or from local memory
    matrix: dict[str, int]  # tensor-core instruction → how many


def cases() -> list[Case]:
    """What is compiled: on each architecture XL's sizes, on 9.0 also every other edge."""
    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    fp8, int8 = torch.float8_e4m3fn, torch.int8
    found: list[Case] = []
    for sm in SHARED_MEMORY:
        for variant in ("attention", "attention_tma") if sm >= 90 else ("attention",):
            # 16 images fill a GPU with tiles of 128 queries, 2 images take those of 64.
            found += [Case(variant, sm, brain, (n, 256, 16, 72)) for n in (16, 2)]
            found.append(Case(variant, sm, half, (16, 256, 16, 64)))
        rows = (2, 256, 1152)
        found += [Case(operator, sm, brain, rows) for operator in ROW_KERNELS]
        for codes in (int8, fp8) if sm >= 89 else (int8,):
            found.append(Case("layernorm_modulate_quantize", sm, brain, rows, codes))
            found.append(Case("quantize_rows", sm, brain, (2, 256, 4608), codes))
        found.append(Case("groupnorm_silu", sm, brain, (1, 512, 64)))
        found.append(Case("guided_step", sm, half, (2, 32)))
        found.append(Case("gelu", sm, brain, (2, 256, 4608)))
    found += [
        Case("attention", 90, brain, (16, 1001, 16, 72)),  # a ragged number of tokens
        Case("attention_tma", 90, brain, (16, 1001, 16, 72)),
        Case("attention", 90, brain, (2, 16, 4, 32)),  # a small model
        Case("attention", 90, brain, (16, 256, 16, 128)),  # the widest head
        *(Case("attention", 90, full, (2, 256, 16, d)) for d in (72, 128)),  # no tensor cores
        # A size of 1 becomes a constant, which is another program.
        Case("attention", 90, brain, (1, 1, 16, 72)),
        Case("gate_residual_layernorm_modulate", 90, brain, (1, 1, 1152)),
        Case("groupnorm_silu", 90, brain, (1, 128, 1)),
        Case("groupnorm_silu", 90, half, (1, 128, 256)),  # the narrowest level and the most pixels
        *(Case(operator, 90, half, (2, 256, d)) for operator in ROW_KERNELS for d in (384, 1024)),
        *(Case(operator, 90, full, (2, 256, 1152)) for operator in ROW_KERNELS),
    ]
    return found


def _rows(case: Case) -> list[Any]:
    """x, gate, shift and scale; on meta, a tensor has no numbers."""
    n, tokens, width = case.sizes
    x = torch.empty(n, tokens, width, dtype=case.dtype, device="meta")
    return [x, *torch.empty(n, 6 * width, dtype=case.dtype, device="meta").chunk(6, 1)[:3]]


def arguments_of(case: Case) -> list[Any]:
    """What the launcher is called with."""
    empty = functools.partial(torch.empty, device="meta")
    if case.operator.startswith("attention"):
        n, tokens, heads, d = case.sizes
        return [empty(n, tokens, 3 * heads * d, dtype=case.dtype), heads]
    if case.operator == "groupnorm_silu":
        n, channels, side = case.sizes
        x = empty(n, channels, side, side, dtype=case.dtype)
        affine = empty(2, channels, dtype=case.dtype)
        return [x.to(memory_format=torch.channels_last), 32, *affine, 1e-6]
    if case.operator == "guided_step":
        n, side = case.sizes
        tokens = empty(2 * n, side * side // 4, 32, dtype=case.dtype)
        return [tokens, *empty(3, n, 4, side, side), empty(n), empty(9), 3, 2]
    x, gate, shift, scale = _rows(case)
    return {
        "layernorm_modulate": [x, shift, scale, 1e-6],
        "gate_residual": [x, x, gate],
        "gate_residual_layernorm_modulate": [x, x, gate, shift, scale, 1e-6],
        "layernorm_modulate_quantize": [x, shift, scale, 1e-6, case.codes],
        "quantize_rows": [x, case.codes],
        "gelu": [x],
    }[case.operator]


class _Recorder:
    """Stands in for a kernel, and keeps the arguments of its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, **named: Any) -> None:
        self.launches.append(dict(zip(self.kernel.arg_names, arguments, strict=False)) | named)


def _launches(case: Case) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(kernel, its arguments by name) for every launch that the launcher makes on such a GPU."""
    from triton.runtime.jit import JITFunction

    module = import_module(f"dit_kernels.triton.{case.operator}")
    kernels = {
        name: _Recorder(value)
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    # On meta tensors, which hold no numbers, so that a launcher costs no more than its Python.
    facts = {"device_facts": lambda device: (case.capability // 10, PROCESSORS)}
    if "device_facts" not in vars(module):
        facts = {}
    with patch.multiple(module, **facts, **kernels):
        getattr(module, case.operator)(*arguments_of(case))
    for recorder in kernels.values():
        for arguments in recorder.launches:
            yield recorder.kernel, arguments


def _compile(kernel: Any, arguments: dict[str, Any], capability: int) -> Any:
    """As a launch would: 1 and None are constants, what 16 divides is marked."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, name in enumerate(kernel.arg_names):
        value, parameter = arguments[name], kernel.params[position]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[(position,)] = value
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif type(value) is int:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        elif type(value) is float:
            signature[name] = "fp32"
        else:  # a tensor descriptor
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
    source = ASTSource(kernel, signature, constants, attributes)
    options = {name: value for name, value in arguments.items() if name not in kernel.arg_names}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _inspect(compiled: Any) -> Resources:
    import triton.backends

    programs = Path(triton.backends.__file__).parent / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = run([programs / "cuobjdump", "--dump-resource-usage", cubin.name]).stdout
        code = run([programs / "nvdisasm", "-c", cubin.name]).stdout
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    matrix: dict[str, int] = {}
    for name in re.findall(r"\b(HGMMA|HMMA|UTCHMMA)\b", code):
        matrix[name] = matrix.get(name, 0) + 1
    # A store of RZ, the zero register, keeps nothing: Triton 3.6 has such beside TMA on sm_120.
    spills = len(re.findall(r"\bLDL\b|\bSTL\b(?!.*, RZ\b)", code))
    return Resources(int(registers[1]), compiled.metadata.shared, spills, matrix)


def measure(case: Case) -> dict[str, Resources]:
    """kernel → its resources, for every kernel that the case launches."""
    return {
        kernel.__name__: _inspect(_compile(kernel, arguments, case.capability))
        for kernel, arguments in _launches(case)
    }


def main() -> None:
    import triton
    from triton_workers import compilers

    every = cases()
    print(f"Triton {triton.__version__}")
    for case, measured in zip(every, compilers().map(measure, every), strict=True):
        for kernel, r in measured.items():
            matrix = " ".join(f"{count} {name}" for name, count in r.matrix.items())
            print(f"{case.name}: {kernel} {r.registers} registers, {r.shared_bytes} bytes shared, "
                  f"{r.spills} spills {matrix}")  # fmt: skip


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1] / "support"))
    # By its import name, so that the workers unpickle the same classes.
    import_module("kernel_resources").main()
