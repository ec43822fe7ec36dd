"""What every implementation of every operator is tested with, and how its results are judged.

Each shape stands at an edge of some implementation, and says at which. Implementations are the
native library at every instruction set, Triton's kernels in its interpreter, and on a GPU. The file
is over 300 lines so that all operators' cases and the one way of judging them stand together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from numerics import assert_close_to_reference
from torch import Tensor

from dit_kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Run = Callable[..., Any]
EPS = 1e-6


class Case(NamedTuple):
    reason: str
    arguments: tuple[Any, ...]
    large: bool = False  # Triton's interpreter would take many seconds


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


ROWS = {
    (2, 3, 384): "S's width: a tile of 512 in Triton",
    (2, 3, 1024): "L's width: a full tile",
    (2, 3, 1152): "XL's width: a tile of 2,048",
    (2, 5, 2048): "a full tile, with more warps than the others",
    (2, 5, 250): "no whole number of vectors of 16 bytes in Triton",
    (2, 5, 24): "less than a vector of AVX-512 behind the first one",
    (3, 7, 36): "half a vector of AVX2 left",
    (2, 5, 17): "one element behind whole vectors",
    (1, 1, 3): "less than a vector",
    (2, 1, 1): "a single element, whose variance is 0",
    (2, 256, 384): "all tokens of images of 256 pixels: shared among threads",
}


def row_inputs(
    n: int, t: int, d: int, dtype: torch.dtype, modulation: torch.dtype | None = None
) -> list[Tensor]:
    """x and y (N, T, D); gate, shift and scale (N, D) as the strided views of a chunk(6)."""
    x, y = (random(n, t, d, dtype=dtype, seed=seed) * 2 + 0.5 for seed in (0, 1))
    return [x, y, *random(n, 6 * d, dtype=modulation or dtype, seed=9).chunk(6, dim=1)[1:4]]


def _rows(dtype: torch.dtype, take: Callable[..., tuple[Any, ...]]) -> Iterator[Case]:
    for shape, reason in ROWS.items():
        yield Case(reason, take(*row_inputs(*shape, dtype)), large=shape[1] == 256)
    x, y, *rows = row_inputs(3, 5, 72, dtype)
    expanded = [row[:1].expand(3, -1) for row in rows]
    yield Case("one row of modulation for all images: a stride of 0", take(x, y, *expanded))
    if dtype != torch.float32:
        wide = row_inputs(2, 3, 384, dtype, torch.float32)
        mixed = [wide[0], wide[1], wide[2].to(dtype), *wide[3:]]
        yield Case("float32 shift and scale of a half-precision model, another gate", take(*mixed))


ATTENTION = {
    (1, 256, 2, 64): "S's, B's and L's head dimension, an image of 256 pixels",
    (1, 256, 2, 72): "XL's head dimension: tiles of 64 + 16 in Triton, 8 columns masked",
    (3, 40, 16, 72): "XL's heads and several images",
    (2, 1, 2, 72): "a single token",
    (2, 5, 2, 72): "fewer tokens than a vector",
    (2, 16, 2, 64): "the smallest tile, exactly full",
    (2, 37, 2, 72): "a second block of queries (32) with few of them",
    (1, 130, 2, 72): "a third block of keys (64) with two of them",
    (1, 300, 2, 72): "blocks of keys of 64, 96, 128 and 256 with a rest",
    **{(1, 20, 3, d): f"head dimension {d}: another split into tiles, vectors and pairs"
       for d in (8, 16, 24, 32, 40, 48, 80, 96, 104, 128)},
}  # fmt: skip


def qkv_of(n: int, t: int, heads: int, d: int, dtype: torch.dtype) -> Tensor:
    return random(n, t, 3 * heads * d, dtype=dtype, seed=1000 * d + t)


def _attention(dtype: torch.dtype) -> Iterator[Case]:
    for (n, t, heads, d), reason in ATTENTION.items():
        yield Case(reason, (qkv_of(n, t, heads, d, dtype), heads), large=t >= 256 or heads == 16)
    for t in (130, 1300):
        qkv = qkv_of(1, t, 2, 72, dtype)
        k = qkv.view(t, 3, 2, 72)[:, 1]
        k.copy_((k.float() * torch.linspace(0.1, 4, t).view(t, 1, 1)).to(dtype))
        growing = "growing keys: the running maximum moves in every block, and sums are rescaled"
        yield Case(growing, (qkv, 2), large=t == 1300)


GROUPNORM = {
    ((2, 128, 16, 16), 32): "the narrowest level of Stable Diffusion's decoder",
    ((1, 512, 8, 8), 32): "its widest level",
    ((1, 128, 7, 9), 32): "few pixels: sums about the first one alone lose digits in the variance",
    ((2, 36, 33, 31), 4): "groups of 9, padded to 16 in Triton; half a vector of AVX2 left",
    ((1, 20, 3, 3), 5): "a number of groups that is no power of two",
    ((1, 6, 5, 3), 1): "a single group",
    ((1, 4, 1, 1), 2): "a single pixel",
    ((1, 64, 64, 48), 32): "more pixels than one tile",
    ((1, 32, 96, 97), 8): "more pixels than one thread's piece",
}


def images(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.5) -> Tensor:
    x = random(*shape) * 2 + mean
    return x.to(dtype, memory_format=torch.channels_last)


def _groupnorm(dtype: torch.dtype) -> Iterator[Case]:
    for (shape, groups), reason in GROUPNORM.items():
        weight, bias = random(2, shape[1], seed=2)
        x = images(shape, dtype)
        yield Case(reason, (x, groups, weight, bias, EPS), large=shape[2] in (33, 64, 96))
        if shape[2] < 9:
            yield Case("weight in x's dtype", (x, groups, weight.to(dtype), bias.to(dtype), EPS))


STEPS = {  # latent side, patch, guided channels, guided, learned variance
    (32, 2, 3, True, True): "as published, at 256 pixels",
    (8, 2, 4, True, True): "guidance of all channels",
    (8, 2, 1, True, False): "guidance of a single channel; no learned variance",
    (8, 4, 3, False, True): "no guidance: as many rows as images",
    (12, 4, 3, False, False): "a side that is no power of two; neither of both",
    (8, 8, 3, True, True): "a single patch",
    (3, 1, 3, True, True): "patches of one pixel; an odd side",
    (10, 2, 4, True, True): "an odd number of patches per side",
}


def step_inputs(
    n: int, s: int, p: int, guided: bool, learned: bool, dtype: torch.dtype
) -> list[Tensor]:
    """tokens, z, x0_before, noise, guidance_scale, coefficients."""
    channels = 4 * (1 + learned)
    tokens = random(n * (1 + guided), (s // p) ** 2, p * p * channels, dtype=dtype)
    scale = torch.tensor([4.0, 1.0, 0.0, 7.5][:n])
    coefficients = torch.tensor([1.1, -0.4, 0.5, 0.4, 0.1, -0.2, -5.0, -2.0, 0.8])
    return [tokens, *(random(n, 4, s, s, seed=seed) for seed in (1, 2, 3)), scale, coefficients]


def _guided_step(dtype: torch.dtype) -> Iterator[Case]:
    for (s, p, channels, *both), reason in STEPS.items():
        yield Case(reason, (*step_inputs(3, s, p, *both, dtype), channels, p))
    for learned in (False, True):
        arguments = step_inputs(2, 8, 2, True, learned, dtype)
        arguments[3].fill_(torch.nan)
        arguments[5][8] = 0
        yield Case("without a deviation the noise is not read", (*arguments, 3, 2))
    arguments = step_inputs(2, 8, 2, True, True, dtype)
    arguments[0][3] = torch.nan
    yield Case("an image at scale 1 does not read its unconditional row", (*arguments, 3, 2))


def _gelu(dtype: torch.dtype) -> Iterator[Case]:
    yield Case("two programs and a rest of one element", (random(3, 683, dtype=dtype) * 3,))
    yield Case("an odd number of pieces", (random(100_003, dtype=dtype) * 3,), large=True)
    yield Case("a single element", (random(1, dtype=dtype),))


def _gelu_quantize_rows(dtype: torch.dtype) -> Iterator[Case]:
    for case in _quantize_rows(dtype):
        yield Case(case.reason, (case.arguments[0] * 1.5, torch.int8), case.large)


def _quantize_rows(dtype: torch.dtype) -> Iterator[Case]:
    for shape, reason in ROWS.items():
        x = random(*shape, dtype=dtype) * 2
        yield Case(reason, (x, torch.int8), large=shape[1] == 256)
    x = random(2, 5, 4608, dtype=dtype)
    x[0, 0] = 0
    yield Case("XL's hidden layer, and a row of zeros", (x, torch.int8))


CASES: dict[str, Callable[[torch.dtype], Iterator[Case]]] = {
    "layernorm_modulate": lambda t: _rows(t, lambda x, y, g, b, s: (x, b, s, EPS)),
    "gate_residual": lambda t: _rows(t, lambda x, y, g, b, s: (x, y, g)),
    "gate_residual_layernorm_modulate": lambda t: _rows(t, lambda *v: (*v, EPS)),
    "layernorm_modulate_quantize": lambda t: _rows(
        t, lambda x, y, g, b, s: (x, b, s, EPS, torch.int8)
    ),
    "gate_residual_layernorm_modulate_quantize": lambda t: _rows(
        t, lambda *v: (*v, EPS, torch.int8)
    ),
    "quantize_rows": _quantize_rows,
    "gelu_quantize_rows": _gelu_quantize_rows,
    "attention": _attention,
    "groupnorm_silu": _groupnorm,
    "guided_step": _guided_step,
    "gelu": _gelu,
}
TO_FLOATS = [operator for operator in CASES if "quantize" not in operator]
TRITON_ONLY = ("gelu_quantize_rows",)
# Operator → which arguments the results may be written over.
OVERWRITTEN: dict[str, tuple[int, ...]] = {
    "layernorm_modulate": (0,),
    "gate_residual": (0,),
    "gate_residual_layernorm_modulate": (0, 1),
    "groupnorm_silu": (0,),
    "guided_step": (1, 2),
    "gelu": (0,),
}


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def moved(arguments: Sequence[Any], device: str) -> list[Any]:
    """The arguments on ``device``, tensors with their strides."""

    def move(v: Tensor) -> Tensor:
        if 0 in v.stride():
            return v[:1].to(device).expand(v.shape)
        return torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=device).copy_(v)

    return [move(v) if isinstance(v, Tensor) else v for v in arguments]


def definitions(operator: str, arguments: Sequence[Any]) -> tuple[tuple[Tensor, ...], ...]:
    """The reference's results in float64, and in the arguments' own dtype."""
    run = getattr(reference, operator)
    floating = [isinstance(v, Tensor) and v.is_floating_point() for v in arguments]
    wide = [v.double() if f else v for v, f in zip(arguments, floating, strict=True)]
    return as_tuple(run(*wide)), as_tuple(run(*arguments))


def check(
    run: Run, operator: str, dtype: torch.dtype, *, large: bool = True, device: str = "cpu"
) -> None:
    """Every case is at most twice as far from float64 as the reference in the same dtype.

    Cases of few numbers are judged together: twice the error of one row may be no error at all.
    """
    few: list[tuple[Tensor, Tensor, Tensor]] = []
    for case in CASES[operator](dtype):
        if case.large and not large:
            continue
        arguments = case.arguments if device == "cpu" else moved(case.arguments, device)
        actual = as_tuple(run(*arguments))
        floats = operator
        if operator not in TO_FLOATS:
            check_codes(operator, arguments, actual)
            if len(actual) == 2:
                continue
            # The codes are those of the norm of the first result.
            actual, arguments, floats = actual[:1], arguments[:3], "gate_residual"
        for a, exact, same in zip(actual, *definitions(floats, arguments), strict=True):
            assert a.dtype == same.dtype and a.shape == same.shape, case.reason
            if a.numel() < 2000:
                few.append((a.flatten().cpu(), exact.flatten().cpu(), same.flatten().cpu()))
            else:
                assert_close_to_reference(a, exact, same_dtype=same)
    if few:
        a, exact, same = (torch.cat(part) for part in zip(*few, strict=True))
        assert_close_to_reference(a, exact, same_dtype=same)


def check_codes(operator: str, arguments: Sequence[Any], actual: Sequence[Tensor]) -> None:
    """Half a step from the exact values, up to the float32 in which they were computed."""
    codes, scales = (v.double() for v in actual[-2:])
    x = (arguments[0] if len(actual) == 2 else actual[0]).double()
    if "layernorm_modulate" in operator:
        x = reference.layernorm_modulate(x, *(v.double() for v in arguments[-4:-2]), arguments[-2])
    elif operator == "gelu_quantize_rows":
        x = reference.gelu(x)
    if actual[-2].dtype == torch.uint8:
        codes -= 128
    assert codes.shape == x.shape and scales.shape == x.shape[:-1]
    assert actual[-1].dtype == torch.float32 and codes.abs().max() <= 127
    steps = x.abs().amax(-1).clamp(min=1e-12) / 127
    torch.testing.assert_close(scales, steps, rtol=1e-5, atol=1e-15)
    assert (codes - x / scales.unsqueeze(-1)).abs().max() <= 0.501


def special_cases(operator: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Arguments with a NaN or an infinity in them, in one image, head, group or row."""
    ends = [torch.nan, torch.inf, -torch.inf]
    if operator == "gelu":  # in whole vectors and behind them
        big = torch.finfo(dtype).max
        x = torch.tensor([*ends, 0.0, -0.0, big, -big, 6e4, -6e4, 1e-7]).to(dtype).repeat(3)
        yield (x,)
        return
    for value in ends:
        if operator == "attention":
            for part in range(3):  # of q, k and v
                qkv = qkv_of(2, 70, 2, 72, dtype)
                qkv.view(2, 70, 3, 2, 72)[1, 66, part, 0, 3] = value
                yield qkv, 2
        elif operator == "groupnorm_silu":
            x = images((2, 24, 9, 9), dtype)
            x[1, 5, 8, 8] = value
            yield x, 4, *random(2, 24, seed=2), EPS
        elif operator == "guided_step":
            arguments = step_inputs(2, 8, 2, True, True, dtype)
            arguments[0][0, 3, 5] = arguments[1][1, 1, 2, 3] = value
            yield *arguments, 3, 2
        else:
            x, y, gate, shift, scale = row_inputs(2, 5, 45, dtype)
            x[0, 1, 44] = y[1, 2, 3] = value
            yield {
                "gate_residual": (x, y, gate),
                "layernorm_modulate": (x, shift, scale, EPS),
                "gate_residual_layernorm_modulate": (x, y, gate, shift, scale, EPS),
            }[operator]


def check_special(run: Run, operator: str, dtype: torch.dtype) -> None:
    """NaN and infinities are where the reference has them, and the rest is as near as allowed."""
    for arguments in special_cases(operator, dtype):
        actual = as_tuple(run(*arguments))
        for a, exact, same in zip(actual, *definitions(operator, arguments), strict=True):
            finite = same.isfinite()
            assert not finite.all() or operator == "guided_step"
            assert torch.equal(a.isnan(), same.isnan())
            assert torch.equal(a[same.isinf()], same[same.isinf()])
            assert_close_to_reference(a[finite], exact[finite], same_dtype=same[finite])


def check_given_memory(run: Run, operator: str, dtype: torch.dtype, copy: Run) -> None:
    """Results written over the arguments, which ``copy`` makes, have the bits of new ones."""
    for case in [c for c in CASES[operator](dtype) if not c.large][::3]:
        expected = as_tuple(run(*case.arguments))
        own = [copy(v) if isinstance(v, Tensor) else v for v in case.arguments]
        out = tuple(own[i] for i in OVERWRITTEN[operator])
        results = as_tuple(run(*own, out=out if len(expected) > 1 else out[0]))
        for result, into, value in zip(results, out, expected, strict=True):
            assert result is into and torch.equal(result, value), case.reason


def check_empty(run: Run, operator: str, dtype: torch.dtype) -> None:
    """A batch of no images gives results of no images."""
    case = next(CASES[operator](dtype))
    n = case.arguments[1 if operator == "guided_step" else 0].shape[0]
    cut = [v[:0] if isinstance(v, Tensor) and v.shape[0] in (n, 2 * n) else v
           for v in case.arguments]  # fmt: skip
    for result, like in zip(as_tuple(run(*cut)), as_tuple(run(*case.arguments)), strict=True):
        assert result.shape == (0, *like.shape[1:]) and result.dtype == like.dtype
