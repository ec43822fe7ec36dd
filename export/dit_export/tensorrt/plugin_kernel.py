"""PTX of the fused adaLN operator in the form that a TensorRT plugin launches.

TensorRT passes a kernel the inputs' pointers, then integers, then the outputs' pointers; everything
else must be a constant of the kernel.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dit_export.tensorrt.plugin import EPS
from dit_kernels.triton.launch import row_tiles
from dit_kernels.triton.layernorm_modulate import _layernorm_modulate_kernel

DTYPES = ("fp32", "fp16", "bf16")
ROWS = (1, 2, 4)
"""Rows of one program, which are the plugin's tactics: TensorRT times them and takes one."""

POINTERS = ("x", "shift", "scale", "out")


@triton.jit
def _layernorm_modulate_plugin_kernel(
    x,  # (N, T, D) contiguous
    shift,  # (N, D) contiguous
    scale,  # (N, D) contiguous
    tokens,  # T
    blocks,  # programs an image
    out,  # (N, T, D) contiguous
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS_EACH: tl.constexpr,
):
    _layernorm_modulate_kernel(
        x, shift, scale, out, tokens, blocks, D, D, EPSILON, D, HEAD, TAIL, ROWS_EACH
    )


class PluginKernel(NamedTuple):
    """entry: the kernel's name in ``ptx``; rows: of one image, in one program."""

    entry: str
    ptx: str
    rows: int
    threads: int
    shared_bytes: int

    def programs_an_image(self, tokens: int) -> int:
        return -(-tokens // self.rows)


@functools.cache
def compile_kernel(width: int, dtype: str, rows: int, capability: str) -> PluginKernel:
    """Compile without a GPU for rows of ``width``.

    Args:
        dtype: one of `DTYPES`; rows: one of `ROWS`; capability: such as "9.0".
    """
    head, tail, _, num_warps = row_tiles(width)
    constants = {"EPSILON": EPS, "D": width, "HEAD": head, "TAIL": tail, "ROWS_EACH": rows}
    kernel = _layernorm_modulate_plugin_kernel
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else f"*{dtype}" if name in POINTERS else "i32"
        for name in names
    }
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in POINTERS},
    )
    major, minor = capability.split(".")
    target = GPUTarget("cuda", int(major) * 10 + int(minor), 32)
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True  # an engine need not know our paths
        compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
    facts = compiled.metadata
    if facts.global_scratch_size:
        raise ValueError(f"the kernel needs {facts.global_scratch_size} bytes of scratch memory")
    ptx = only_parameters(compiled.asm["ptx"], facts.name, len(names) - len(constants))
    return PluginKernel(facts.name, ptx, rows, num_warps * 32, facts.shared)


def only_parameters(ptx: str, entry: str, count: int) -> str:
    """The PTX of ``entry`` with its first ``count`` parameters alone.

    Triton adds pointers to scratch memory, which its own launcher passes and TensorRT does not: a
    launch would read past the end of the arguments. Raises ValueError where the kernel reads them.
    """
    declaration = re.search(rf"\.entry {re.escape(entry)}\((.*?)\)", ptx, re.DOTALL)
    if declaration is None:
        raise ValueError(f"the PTX has no entry {entry}")
    parameters = [line.strip() for line in declaration[1].split(",")]
    for name in (parameter.split()[-1] for parameter in parameters[count:]):
        if re.search(rf"\[{re.escape(name)}\b", ptx):
            raise ValueError(f"the kernel reads {name}, which TensorRT does not pass")
    kept = ",\n\t".join(parameters[:count])
    return ptx[: declaration.start(1)] + f"\n\t{kept}\n" + ptx[declaration.end(1) :]
