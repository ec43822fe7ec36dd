"""Every Triton kernel compiles for every supported GPU, in registers, and uses its tensor cores."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from cases import CASES
from torch import Tensor
from triton_workers import compilers, require_triton

# Compute capability → bytes of shared memory that a block may have (CUDA C++ Programming Guide,
# table of technical specifications). 8.6 has 8.9's limits and no instructions of its own.
SHARED_MEMORY = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
PROCESSORS = 132
MATRIX_INSTRUCTION = {8: "HMMA", 9: "HGMMA", 10: "UTCHMMA", 12: "HMMA"}
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
FP8, INT8 = torch.float8_e4m3fn, torch.int8
TYPES = {FULL: "fp32", BRAIN: "bf16", HALF: "fp16", INT8: "i8", FP8: "fp8e4nv",
         torch.int32: "i32", torch.int64: "i64"}  # fmt: skip
CANDIDATES = {"attention": 3, "attention_tma": 5}  # tiles to choose from on Hopper
EMPTY = functools.partial(torch.empty, device="meta")  # no numbers: a launcher costs its Python


class Case(NamedTuple):
    """One call of a launcher, compiled for one compute capability."""

    operator: str
    capability: int
    dtype: torch.dtype
    sizes: tuple[int, ...]  # as `arguments_of` takes them
    codes: torch.dtype | None = None
    tiles: int | None = None  # which of attention's candidates for Hopper
    parts: int = 0  # of a product's sums, before a gated norm


class Resources(NamedTuple):
    shared_bytes: int
    spills: int  # instructions that move registers to or from local memory
    matrix: Counter[str]  # tensor-core instruction → how many
    instructions: Counter[str]  # with their suffixes → how many


def cases() -> list[Case]:
    """What is compiled: on each architecture XL's sizes, on 9.0 also every other edge."""
    fused, rows = "gate_residual_layernorm_modulate", (2, 256, 1152)
    found: list[Case] = []
    for sm in SHARED_MEMORY:
        # 16 images fill a GPU with tiles of 128 queries, which need the most memory.
        variants = ("attention", "attention_tma") if sm >= 90 else ("attention",)
        found += [Case(variant, sm, BRAIN, (16, 256, 16, 72)) for variant in variants]
        found += [
            Case(op, sm, BRAIN, rows) for op in ("layernorm_modulate", fused, "gate_residual")
        ]
        for codes in (INT8, FP8) if sm >= 89 else (INT8,):
            for op in ("layernorm_modulate_quantize", f"{fused}_quantize", "quantize_rows"):
                found.append(Case(op, sm, BRAIN, rows, codes))
            found.append(Case("gelu_quantize_rows", sm, BRAIN, (2, 256, 4608), codes))
        found.append(Case("groupnorm_silu", sm, BRAIN, (1, 512, 64)))
        found.append(Case("guided_step", sm, HALF, (2, 32)))
        found.append(Case("gelu", sm, BRAIN, (2, 256, 4608)))
    return [
        *found,
        *(
            Case(variant, 90, dtype, sizes)
            for variant in ("attention", "attention_tma")
            for dtype, sizes in (
                (HALF, (16, 256, 16, 64)),  # no second tile of columns
                (BRAIN, (16, 1001, 16, 72)),  # a ragged number of tokens
            )
        ),
        *(
            Case(variant, 90, BRAIN, (16, 256, 16, 72), tiles=i)
            for variant, count in CANDIDATES.items()
            for i in range(count)
        ),
        Case("attention", 90, BRAIN, (2, 16, 4, 32)),  # a small model
        Case("attention", 90, BRAIN, (16, 256, 16, 128)),  # the widest head
        Case("attention", 90, FULL, (2, 256, 16, 128)),  # no tensor cores
        # A size of 1 becomes a constant, which is another program.
        Case("attention", 90, BRAIN, (1, 1, 16, 72)),
        Case(fused, 90, BRAIN, (1, 1, 1152)),
        Case("groupnorm_silu", 90, BRAIN, (1, 128, 1)),
        Case("groupnorm_silu", 90, HALF, (1, 128, 256)),  # the narrowest level and the most pixels
        Case(fused, 90, HALF, (2, 256, 384)),
        Case(fused, 90, FULL, rows),
    ]


def row_cases() -> list[Case]:
    """Every kernel that computes whole rows, at every published width (S, B, L, XL)."""
    fused, found = "gate_residual_layernorm_modulate", []
    for width in (384, 768, 1024, 1152):
        row, hidden = (64, 256, width), (64, 256, 4 * width)
        found += [
            *(Case(op, 90, BRAIN, row) for op in ("layernorm_modulate", "gate_residual", fused)),
            Case(fused, 90, BRAIN, row, parts=3),
            Case("layernorm_modulate_quantize", 90, BRAIN, row, FP8),
            Case(f"{fused}_quantize", 90, BRAIN, row, FP8),
            *(Case("quantize_rows", 90, BRAIN, sizes, FP8) for sizes in (row, hidden)),
            Case("gelu_quantize_rows", 90, BRAIN, hidden, FP8),
        ]
    return found


def arguments_of(case: Case) -> list[Any]:
    """What the launcher is called with."""
    n, *sizes = case.sizes
    if case.operator.startswith("attention"):
        tokens, heads, d = sizes
        return [EMPTY(n, tokens, 3 * heads * d, dtype=case.dtype), heads]
    if case.operator == "groupnorm_silu":
        channels, side = sizes
        x = EMPTY(n, channels, side, side, dtype=case.dtype)
        affine = EMPTY(2, channels, dtype=case.dtype)
        return [x.to(memory_format=torch.channels_last), 32, *affine, 1e-6]
    if case.operator == "guided_step":
        tokens = EMPTY(2 * n, sizes[0] ** 2 // 4, 32, dtype=case.dtype)
        return [tokens, *EMPTY(3, n, 4, sizes[0], sizes[0]), EMPTY(n), EMPTY(9), 3, 2]
    if case.operator == "add_shift":
        x = EMPTY(n, *sizes, dtype=case.dtype).to(memory_format=torch.channels_last)
        return [x, x, EMPTY(sizes[0])]
    if case.operator == "softmax":
        return [EMPTY(n, *sizes), 0.5, case.dtype]
    x = EMPTY(n, *sizes, dtype=case.dtype)
    y = EMPTY(case.parts, *x.shape) if case.parts else x
    gate, shift, scale = EMPTY(n, 6 * sizes[1], dtype=case.dtype).chunk(6, 1)[:3]
    return {
        "layernorm_modulate": [x, shift, scale, 1e-6],
        "gate_residual": [x, x, gate],
        "gate_residual_layernorm_modulate": [x, y, gate, shift, scale, 1e-6],
        "layernorm_modulate_quantize": [x, shift, scale, 1e-6, case.codes],
        "gate_residual_layernorm_modulate_quantize": [x, x, gate, shift, scale, 1e-6, case.codes],
        "quantize_rows": [x, case.codes],
        "gelu_quantize_rows": [x, case.codes],
        "gelu": [x],
    }[case.operator]


def _candidates(variant: str) -> Sequence[Any]:
    attention = import_module("dit_kernels.triton.attention")  # which imports Triton
    found = {"attention": attention.POINTERS, "attention_tma": attention.DESCRIPTORS}[variant]
    assert len(found) == CANDIDATES[variant]
    return found


def _launches(case: Case, **more: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(kernel, its arguments by name) for every launch that the launcher makes on such a GPU."""
    from triton.runtime.jit import JITFunction

    made: list[tuple[Any, dict[str, Any]]] = []

    class Recorder:
        """Stands in for a kernel, and keeps the arguments of its launches."""

        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            names = self.kernel.arg_names
            return lambda *given, **named: made.append(
                (self.kernel, dict(zip(names, given, strict=False)) | named)
            )

    module = import_module(f"dit_kernels.triton.{case.operator}")
    stand_ins: dict[str, Any] = {
        name: Recorder(value)
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    options = dict(more)
    if case.tiles is not None:
        options["tiles"] = _candidates(case.operator)[case.tiles]
    if case.parts:
        options["bias"] = EMPTY(case.sizes[-1], dtype=case.dtype)
    facts = (case.capability // 10, PROCESSORS)
    with (
        patch.multiple(module, **stand_ins),
        patch("dit_kernels.triton.attention.device_facts", return_value=facts),
    ):
        getattr(module, case.operator)(*arguments_of(case), **options)
    yield from made


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
        is_int = type(value) is int
        special = is_int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[name] = "constexpr"
            constants[(position,)] = value
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif isinstance(value, int | float):
            signature[name] = "i32" if is_int else "fp32"
        else:  # a tensor descriptor
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
        aligned = special and signature[name] == "i32" and value % 16 == 0
        if signature[name].startswith("*") or aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {name: value for name, value in arguments.items() if name not in kernel.arg_names}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _disassemble(compiled: Any) -> str:
    import triton.backends

    programs = Path(triton.backends.__file__).parent / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        return run([programs / "nvdisasm", "-c", cubin.name]).stdout


def _inspect(compiled: Any) -> Resources:
    code = _disassemble(compiled)
    # A store of RZ, the zero register, keeps nothing: Triton 3.6 has such beside TMA on sm_120.
    spills = len(re.findall(r"\bLDL\b|\bSTL\b(?!.*, RZ\b)", code))
    matrix = Counter(re.findall(r"\b(?:HGMMA|HMMA|UTCHMMA)\b", code))
    return Resources(compiled.metadata.shared, spills, matrix, instructions(code))


def instructions(code: str) -> Counter[str]:
    return Counter(re.findall(r"\*/ +(?:@!?U?P\d+ +)?([A-Z0-9_.]+)", code))


def measure(case: Case) -> dict[str, Resources]:
    """kernel → its resources, for every kernel that the case launches."""
    return {
        kernel.__name__: _inspect(_compile(kernel, arguments, case.capability))
        for kernel, arguments in _launches(case)
    }


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_no_spills_enough_shared_memory_and_tensor_cores(capability: int) -> None:
    require_triton()
    chosen = [case for case in cases() if case.capability == capability]
    descriptors = ["attention_tma"] if capability >= 90 else []
    assert {case.operator for case in chosen} == {*CASES, *descriptors}
    for case, kernels in zip(chosen, compilers().map(measure, chosen), strict=True):
        for kernel, resources in kernels.items():
            assert resources.spills == 0, f"{case}: {kernel} spills"
            assert resources.shared_bytes <= SHARED_MEMORY[capability], f"{case}: {kernel}"
        if case.operator.startswith("attention") and TYPES[case.dtype] != "fp32":
            # 16 tokens are fewer than a warp group's rows: mma.sync is what Hopper has for them.
            small = case.sizes[1] < 64
            wanted = "HMMA" if small else MATRIX_INSTRUCTION[capability // 10]
            assert all(r.matrix[wanted] > 0 for r in kernels.values()), str(case)


def groupnorm_code(channels: int, side: int, add: bool) -> tuple[int, list[Counter[str]]]:
    """Values per thread and tile, and the number of each instruction in both kernels."""
    case = Case("groupnorm_silu", 90, BRAIN, (1, channels, side))
    x = arguments_of(case)[0]
    options = {"add": x, "shift": EMPTY(channels)} if add else {}
    launches = list(_launches(case, **options))
    codes = [instructions(_disassemble(_compile(*launch, 90))) for launch in launches]
    return launches[0][1]["ROWS"] * 8, codes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "side", "add"),
    [(512, 32, False), (512, 128, False), (256, 128, True), (128, 256, True), (128, 512, False)],
)
def test_group_norm_at_the_published_widths(channels: int, side: int, add: bool) -> None:
    """Images are read and written 16 bytes at a time, with two special-function instructions per
    value."""
    require_triton()
    numbers, (moments, norm) = compilers().submit(groupnorm_code, channels, side, add).result()

    def count(code: Counter[str], start: str) -> int:
        return sum(n for name, n in code.items() if name.startswith(start))

    for code in (moments, norm):
        assert count(code, "LDL") == count(code, "STL") == 0 and count(code, "BAR.SYNC") <= 6
    assert count(moments, "LDG") == moments["LDG.E.128"] >= numbers // 8 * (1 + add)
    assert moments["STG.E.128"] == (numbers // 8 if add else 0) and moments["STG.E"] == 2
    assert count(moments, "MUFU") <= 3  # none per number
    assert count(norm, "STG") == norm["STG.E.128"] == numbers // 8
    assert norm["LDG.E.128"] >= numbers // 8
    # The few others are the group's moments and its channels' weight, bias and shift, once.
    assert count(norm, "LDG") - norm["LDG.E.128"] <= 6
    assert norm["MUFU.EX2"] == numbers and numbers < norm["MUFU.RCP"] <= numbers + 4


@pytest.mark.slow
def test_the_vaes_other_kernels_read_and_write_whole_vectors() -> None:
    require_triton()
    sizes = {"softmax": [(1, 1024, 1024), (1, 4096, 4096)], "add_shift": [(1, 512, 64, 64)]}
    for case in (
        Case(op, 90, dtype, size) for op in sizes for size in sizes[op] for dtype in (BRAIN, FULL)
    ):
        (found,) = compilers().submit(measure, case).result().values()
        assert found.spills == 0
        for name, count in found.instructions.items():
            assert not name.startswith(("LDG", "STG")) or name.endswith(".128"), f"{case}: {name}"
            assert not name.startswith("BAR.SYNC") or count <= 5, f"{case}: {count} barriers"


@pytest.mark.slow
def test_row_kernels_have_few_barriers_and_access_memory_in_whole_vectors() -> None:
    require_triton()
    chosen = row_cases()
    for case, kernels in zip(chosen, compilers().map(measure, chosen), strict=True):
        (resources,) = kernels.values()
        assert resources.spills == 0, case
        # One warp takes a row, two a hidden layer's or sums': only these wait for each other.
        width, seen = case.sizes[-1], resources.instructions
        barriers = sum(count for name, count in seen.items() if name.startswith("BAR."))
        assert barriers <= (6 if case.parts else 2 if width > 1152 else 0), case
        accesses = {n: seen[n] for n in seen if n.startswith(("LDG", "STG"))}
        scale = {"STG.E": 1} if case.codes else {}  # of a row; all else is in whole vectors
        assert {n: accesses[n] for n in accesses if not n.endswith(".128")} == scale, case
        if not case.codes and not case.parts:
            # Nothing behind the row is loaded: 1152 are 5 vectors of 8 in each of 32 threads.
            tensors = 5 if case.operator.startswith("gate_residual_") else 3
            assert accesses["LDG.E.128"] == tensors * -(-width // 256), case
