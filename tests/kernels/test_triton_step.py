"""The first two kernels of a captured step: in Triton's interpreter, on a GPU, and compiled."""

from __future__ import annotations

import functools
import re
from collections import Counter
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import test_triton_resources as resources
import torch
import torch.nn.functional as F
from cases import DTYPES, random
from numerics import assert_close_to_reference
from torch import Tensor
from triton_workers import compilers, interpreted, require_triton

EMBEDDINGS = {  # (images, channels, latent side, patch, width)
    (2, 4, 8, 2, 48): "a small model",
    (1, 4, 32, 2, 72): "256 pixels: several programs, and columns of a second block",
    (3, 4, 12, 4, 72): "patches of 4; rows that no program's rows divide",
    (2, 4, 16, 8, 64): "patches of 8: many inputs",
    (3, 3, 9, 3, 20): "an odd patch and number of channels; a width that is no power of two",
    (2, 1, 5, 1, 17): "one input; a width without alignment",
    (1, 16, 10, 5, 16): "400 inputs, 25 a channel",
}


def embedding(case: tuple[int, ...]) -> tuple[Tensor, ...]:
    """z, weight (C·p·p, D), bias (D,), positions (T, D)."""
    n, c, s, p, d = case
    weight, bias = random(c * p * p, d, seed=1), random(d, seed=2)
    return random(n, c, s, s), weight, bias, random((s // p) ** 2, d, seed=3)


def check_embed(dtype: torch.dtype, device: str) -> None:
    from dit_kernels.triton.embed import embed

    for case in EMBEDDINGS:
        n, c, _, p, d = case
        z, weight, bias, positions = embedding(case)
        # As the model is written.
        kernel = weight.t().reshape(d, c, p, p)
        exact, same = (
            F.conv2d(z.to(t), kernel.to(t), bias.to(t), p).flatten(2).transpose(1, 2) + positions
            for t in (torch.float64, torch.float32)
        )
        given = [tensor.to(device) for tensor in (z, weight, bias, positions)]
        counter = torch.tensor([6], device=device)
        for halves in (1, 2):
            out = torch.full((halves * n, len(positions), d), torch.nan, device=device).to(dtype)
            assert embed(*given, p, out=out, counter=counter) is out
            for half in out.split(n):
                assert_close_to_reference(half, exact, same_dtype=same.to(dtype))
        assert counter.item() == 8
        alone = torch.empty_like(out[:n])
        assert torch.equal(embed(*given, p, out=alone), out[n:])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@interpreted
def test_embed(dtype: torch.dtype) -> None:
    check_embed(dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_embed_on_a_gpu(dtype: torch.dtype) -> None:
    check_embed(dtype, "cuda")


def check_select_step(device: str) -> None:
    from dit_kernels.triton.select_step import select_step

    for dtype, width in ((torch.bfloat16, 2 * 1027), (torch.float16, 4096), (torch.float32, 6)):
        table = random(3, 2, width, dtype=dtype).to(device)  # steps 4, 5 and 6 of two labels
        every = random(9, 9, seed=1).to(device)
        label = torch.tensor([1, 0, 1], device=device)
        modulation, coefficients = table.new_full((3, width), torch.nan), every.new_zeros(9)
        for step in (4, 6):
            where = [step, table.data_ptr(), 4, 2, every.data_ptr()]
            select_step(modulation, label, coefficients, torch.tensor(where, device=device))
            assert torch.equal(modulation, table[step - 4, label])
            assert torch.equal(coefficients, every[step])


@interpreted
def test_select_step() -> None:
    check_select_step("cpu")


@pytest.mark.gpu
def test_select_step_on_a_gpu() -> None:
    check_select_step("cuda")


class Size(NamedTuple):
    """The sizes of a model and the other compile-time constants of the two kernels."""

    patch: int
    width: int
    halves: int = 2
    dtype: torch.dtype = torch.bfloat16
    capability: int = 90
    images: int = 32


SIZES = [
    *(Size(p, d) for p in (2, 4, 8) for d in (384, 1152)),
    *(Size(2, d) for d in (768, 1024)),
    Size(2, 1152, halves=1),
    Size(2, 1152, dtype=torch.float32),
    *(Size(2, 1152, capability=sm) for sm in (80, 89, 100, 120)),
    Size(32, 1152, images=1),  # a number of rows of 1 becomes a constant
]


def instructions(size: Size) -> list[Counter[str]]:
    """The number of each instruction in the machine code of embed and of select_step."""
    from dit_kernels.triton import embed, select_step

    class Recorder:
        """Stands in for a kernel and records the arguments of its launch."""

        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(*given: Any, **named: Any) -> None:
                arguments = dict(zip(self.kernel.arg_names, given, strict=False)) | named
                compiled = resources._compile(self.kernel, arguments, size.capability)
                code = resources._disassemble(compiled)
                assert compiled.metadata.shared == 0
                counts.append(resources.instructions(code))

            return run

    counts: list[Counter[str]] = []
    empty = functools.partial(torch.empty, device="meta")
    n, p, d, tokens = size.images, size.patch, size.width, (32 // size.patch) ** 2
    with patch.object(embed, "_embed_kernel", Recorder(embed._embed_kernel)):
        embed.embed(
            empty(n, 4, 32, 32), empty(4 * p * p, d), empty(d), empty(tokens, d), p,
            out=empty(size.halves * n, tokens, d, dtype=size.dtype),
            counter=empty(1, dtype=torch.int64),
        )  # fmt: skip
    kernel = Recorder(select_step._select_step_kernel)
    with patch.object(select_step, "_select_step_kernel", kernel):
        modulation = empty(2 * n, (6 * 28 + 2) * d, dtype=size.dtype)
        label, where = empty(2 * n, dtype=torch.int64), empty(5, dtype=torch.int64)
        select_step.select_step(modulation, label, empty(9), where)
    return counts


@pytest.mark.slow
def test_machine_code_at_the_published_sizes() -> None:
    """Threads exchange nothing and spill no registers; rows are accessed 16 bytes at a time."""
    require_triton()
    scalars = ("LDG.E.64", "STG.E.64", "LDG.E", "STG.E")
    for size, (embed, select) in zip(SIZES, compilers().map(instructions, SIZES), strict=True):
        for code in (embed, select):
            assert not [name for name in code if re.match(r"LDL|STL|BAR|LDS|STS", name)], size
            memory = {name for name in code if re.match(r"LDG|STG|ATOM|RED", name)}
            assert memory <= {"LDG.E.128", "STG.E.128", *scalars}, size
        # A thread has 16 bytes of columns. Only latents are read singly, each for all of these.
        columns = 16 // size.dtype.itemsize
        assert embed["LDG.E"] * columns == embed["FFMA"] > 0, size
        rows = embed["STG.E.128"] // size.halves
        assert rows in (2, 4) and [embed[name] for name in scalars[:2]] == [1, 1], size  # counter
        assert [select[name] for name in scalars] == [6, 0, 1, 1], size  # coefficients
        assert select["LDG.E.128"] == select["STG.E.128"] == 2, size
