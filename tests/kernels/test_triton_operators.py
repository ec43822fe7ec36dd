"""The Triton kernels against float64: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import cases
import pytest
import torch
from cases import DTYPES, EPS, moved, qkv_of
from numerics import assert_close_to_reference, exact_float32
from triton_workers import interpreted

import dit_kernels
from dit_kernels import dispatch, reference, triton
from dit_kernels.triton import launch

FP8 = torch.float8_e4m3fn
CUDA = torch.device("cuda")
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
TMA = "attention_tma"
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
VARIANTS = {name: name for name in cases.CASES} | {"attention_tma": "attention"}


def launcher(operator: str) -> Any:
    return getattr(import_module(f"dit_kernels.triton.{operator}"), operator)


@ALL_DTYPES
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(v, marks=pytest.mark.slow) if v in ("attention", TMA, "groupnorm_silu") else v
        for v in VARIANTS
    ],
)
@interpreted
def test_every_case_and_an_empty_batch(variant: str, dtype: torch.dtype) -> None:
    if variant == "attention_tma" and dtype == torch.float32:
        return  # which it refuses
    operator = VARIANTS[variant]
    cases.check(launcher(variant), operator, dtype, large=False)
    cases.check_empty(launcher(variant), operator, dtype)
    if operator in cases.TO_FLOATS and dtype == torch.float16:
        cases.check_special(launcher(variant), operator, dtype)
    if operator in cases.OVERWRITTEN and dtype == torch.float32:
        cases.check_given_memory(launcher(variant), operator, dtype, torch.clone)


@ALL_DTYPES
@interpreted
def test_codes_of_float8(dtype: torch.dtype) -> None:
    for width in (384, 1152):
        x, y, gate, shift, scale = cases.row_inputs(2, 3, width, dtype)
        x[0, 0] = 0
        rows, expected = launcher("quantize_rows")(x, FP8), reference.quantize_rows(x, FP8)
        assert torch.equal(rows[0].float(), expected[0].float())
        assert torch.equal(rows[1], expected[1])
        for operator, arguments in (
            ("layernorm_modulate_quantize", (x, shift, scale, EPS)),
            ("gate_residual_layernorm_modulate_quantize", (x, y, gate, shift, scale, EPS)),
            ("gelu_quantize_rows", (x,)),
        ):
            codes, scales = launcher(operator)(*arguments, FP8)[-2:]
            same, same_scales = getattr(reference, operator)(*arguments, FP8)[-2:]
            torch.testing.assert_close(scales, same_scales, rtol=1e-6, atol=0)
            # A value that lies at the border of two codes may fall to either side.
            assert (codes.double() != same.double()).double().mean() < 1e-3
            wide = [v.double() if isinstance(v, torch.Tensor) else v for v in arguments]
            if "residual" in operator:  # the norm reads the rounded sum
                wide = [reference.gate_residual(x, y, gate).double(), *wide[3:]]
            exact = reference.gelu if operator.startswith("gelu") else reference.layernorm_modulate
            assert_close_to_reference(
                codes.double() * scales.double()[..., None],
                exact(*wide),
                same_dtype=same.double() * same_scales.double()[..., None],
            )


@ALL_DTYPES
@interpreted
def test_partial_sums_of_a_product_and_its_bias_are_added_before_the_gate(
    dtype: torch.dtype,
) -> None:
    run = launcher("gate_residual_layernorm_modulate")
    for splits, width in ((1, 384), (3, 1152), (2, 17)):
        x, _, gate, shift, scale = cases.row_inputs(2, 3, width, dtype)
        parts = cases.random(splits, 2, 3, width, seed=3)
        bias = cases.random(width, dtype=dtype, seed=4) * 3
        whole = parts[0].clone()
        for part in parts[1:]:
            whole += part
        whole += bias.float()
        residual, normed = run(x, parts, gate, shift, scale, EPS, bias=bias)
        wide = (x.double(), parts.double().sum(0) + bias.double(), gate.double())
        assert_close_to_reference(
            residual,
            reference.gate_residual(*wide),
            same_dtype=reference.gate_residual(x, whole, gate),
        )
        own = x.clone()
        again = run(own, parts, gate, shift, scale, EPS, bias=bias, out=(own, normed.clone()))
        assert again[0] is own and torch.equal(own, residual) and torch.equal(again[1], normed)
        assert torch.equal(normed, launcher("layernorm_modulate")(residual, shift, scale, EPS))


@interpreted
def test_a_rows_bits_do_not_depend_on_how_many_rows_a_program_takes() -> None:
    x, y, gate, shift, scale = cases.row_inputs(3, 11, 24, torch.bfloat16)
    norm, gated = (shift, scale, EPS), (y, gate, shift, scale, EPS)
    runs: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("layernorm_modulate", norm),
        ("gate_residual", (y, gate)),
        ("gate_residual_layernorm_modulate", gated),
        ("layernorm_modulate_quantize", (*norm, FP8)),
        ("gate_residual_layernorm_modulate_quantize", (*gated, FP8)),
    )
    for operator, arguments in runs:
        one = cases.as_tuple(launcher(operator)(x, *arguments))
        behind = [torch.full((4, *a.shape[1:]), 7.0).to(a.dtype) for a in one]
        out: Any = tuple(memory[:3] for memory in behind)
        with patch.object(launch, "device_facts", lambda _: (9, 1)):  # 2 rows, also of two images
            launcher(operator)(x, *arguments, out=out if len(out) > 1 else out[0])
        for a, b in zip(one, behind, strict=True):
            assert torch.equal(a.float(), b[:3].float()), operator
            assert (b[3].float() == 7).all(), f"{operator} writes rows that do not exist"


@interpreted
def test_codes_of_halves_and_of_values_that_are_not_finite() -> None:
    run = launcher("quantize_rows")
    halves = torch.arange(127.0) + 0.5
    halves = torch.cat([torch.tensor([127.0, -127.0]), halves, -halves])
    for scale in (1.0, 7.0):  # products with the float32 that is nearest to 1/7 are no halves
        codes, scales = run(scale * halves[None], torch.int8)
        assert torch.equal(codes[0].float(), halves.round()) and scales.tolist() == [scale]
    x = cases.random(4, 384)
    x[0, 3], x[1, 300], x[2, 5] = torch.nan, torch.inf, -torch.inf
    for dtype in (torch.int8, FP8):
        (a, a_scale), (b, b_scale) = run(x, dtype), reference.quantize_rows(x, dtype)
        torch.testing.assert_close(a_scale, b_scale, equal_nan=True)
        torch.testing.assert_close(
            a.double() * a_scale[:, None], b.double() * b_scale[:, None], equal_nan=True
        )


@pytest.mark.slow
@interpreted
def test_group_norm_of_many_tiles_and_far_from_zero() -> None:
    run, affine = launcher("groupnorm_silu"), cases.random(2, 128, seed=2)
    for programs, shape, mean in (
        (4, (1, 128, 33, 31), 0.5),  # two tiles, of which the second ends in its third row
        (8, (1, 128, 27, 16), 0.5),  # a chunk whose last tile has no pixel
        (256, (1, 128, 16, 16), 1000.0),
    ):
        x = cases.images(shape, torch.float32, mean)
        exact = reference.groupnorm_silu(x.double(), 32, *affine.double(), EPS)
        same = reference.groupnorm_silu(x, 32, *affine, EPS)
        with patch("dit_kernels.triton.groupnorm_silu._PROGRAMS", programs):
            actual = run(x, 32, *affine, EPS)
        assert_close_to_reference(actual, exact, same_dtype=same)
        assert actual.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@ALL_DTYPES
@interpreted
def test_group_norm_of_a_sum_and_shifted(dtype: torch.dtype) -> None:
    """The norm adds a residual and a convolution's bias, as in the VAE's decoder."""
    run = launcher("groupnorm_silu")
    for shape, groups in (((2, 128, 8, 8), 32), ((1, 36, 5, 7), 4)):
        x, add = cases.images(shape, dtype), cases.images(shape, dtype, mean=-1).flip(0)
        weight, bias, shift = cases.random(3, shape[1], seed=2)
        for options in (
            {"add": add, "silu": False},
            {"shift": shift * 3},
            {"add": add, "shift": shift},
        ):
            given, expected = x.clone(), x.clone()
            actual = run(given, groups, weight, bias, EPS, **options)
            same = reference.groupnorm_silu(expected, groups, weight, bias, EPS, **options)
            assert torch.equal(given, expected)
            options = {
                k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()
            }
            options.pop("add", None)
            exact = reference.groupnorm_silu(
                expected.double(), groups, weight.double(), bias.double(), EPS, **options
            )
            assert_close_to_reference(actual, exact, same_dtype=same)


@interpreted
def test_group_norm_of_one_image_fills_a_gpu() -> None:
    """Stable Diffusion's decoder at 256 and at 512 pixels: two programs for each of 132
    multiprocessors, and no more than 4 KB of partial moments for each program to read."""
    from dit_kernels.triton.groupnorm_silu import cut

    for channels, side in ((512, 32), (512, 64), (512, 128), (256, 128), (256, 256), (128, 256)):
        for pixels in (side**2, 4 * side**2):
            for item_size in (2, 4):
                way = cut(pixels, 32, channels // 32, item_size)
                assert 250 <= way.parts * way.chunks <= 264
                assert way.chunks * way.tiles * way.rows * way.pixels == pixels
                assert 2 * 4 * way.part * way.chunks <= 4096


@interpreted
def test_group_norm_gives_an_image_the_same_bits_in_any_batch() -> None:
    x = cases.images((3, 64, 8, 12), torch.float32)
    run, affine = launcher("groupnorm_silu"), cases.random(2, 64, seed=2)
    together = run(x, 32, *affine, EPS)
    for i in range(3):
        assert torch.equal(run(x[i : i + 1], 32, *affine, EPS)[0], together[i])


@ALL_DTYPES
@interpreted
def test_add_shift(dtype: torch.dtype) -> None:
    for shape in ((2, 48, 9, 10), (1, 512, 4, 4), (1, 3, 1, 1)):
        x, y = cases.images(shape, dtype), cases.images(shape, dtype).flip(0)
        shift = cases.random(shape[1])
        exact = reference.add_shift(x.double(), y.double(), shift.double())
        same = reference.add_shift(x.clone(), y, shift)
        assert launcher("add_shift")(x, y, shift) is x
        assert_close_to_reference(x, exact, same_dtype=same)


@ALL_DTYPES
@interpreted
def test_softmax(dtype: torch.dtype) -> None:
    run = launcher("softmax")
    for t in (1, 37, 1024):
        scores = cases.random(2, 3, t) * 30
        scores[0, 1, 0] = 1e4
        exact = reference.softmax(scores.double(), 0.3, torch.float64)
        same = reference.softmax(scores, 0.3, dtype)
        actual = run(scores, 0.3, dtype)
        assert actual.dtype == dtype
        if t == 1:
            assert torch.equal(actual, torch.ones(2, 3, 1, dtype=dtype))
            continue
        assert_close_to_reference(actual, exact, same_dtype=same)
    scores[1, 2, 5] = torch.nan
    nan = run(scores, 0.3, dtype).isnan()
    assert nan[1, 2].all() and nan.sum() == t
    assert run(scores[:0], 0.3, dtype).shape == (0, 3, t)


@interpreted
def test_attention_of_large_scores_and_of_keys_that_are_impossible_at_first() -> None:
    qkv = cases.random(1, 40, 3 * 64, dtype=torch.float16)
    qkv[..., :128] *= 30
    impossible = torch.ones(1, 70, 3, 1, 64, dtype=torch.float16)
    impossible[:, :65, 1] = float("-inf")
    impossible = impossible.view(1, 70, -1)
    exact, same = reference.attention(qkv.double(), 1), reference.attention(qkv, 1)
    for variant in ("attention", "attention_tma"):
        run = launcher(variant)
        assert_close_to_reference(run(qkv, 1), exact, same_dtype=same)
        assert run(impossible, 1).isnan().equal(reference.attention(impossible, 1).isnan())


@interpreted
def test_the_descriptor_variant_by_its_public_name() -> None:
    qkv = qkv_of(2, 37, 2, 72, torch.bfloat16)
    found = dit_kernels.attention(qkv, 2, impl="triton-tma")
    assert torch.equal(found, launcher("attention_tma")(qkv, 2))
    misaligned = torch.zeros(16 * 192 + 1, dtype=torch.float16)[1:].view(1, 16, 192)
    with pytest.raises(dit_kernels.Unavailable, match=r"multiple of 16 bytes"):
        dit_kernels.attention(misaligned, 1, impl="triton-tma")


@pytest.mark.slow
@interpreted
def test_every_candidate_of_attention() -> None:
    """Also if no tile divides the number of tokens. "auto" uses the first candidate on a GPU."""
    for tokens, count in ((65, 8), (64, 2), (16, 1)):
        qkv = qkv_of(1, tokens, 1, 72, torch.bfloat16)
        exact, same = reference.attention(qkv.double(), 1), reference.attention(qkv, 1)
        found = dispatch.attention_candidates(1, tokens, 1, 72, qkv.dtype, qkv.device)
        usual = launcher("attention")(qkv, 1)
        assert torch.equal(next(iter(found.values()))(qkv, 1), usual)
        ours = [name for name in found if "warps" in name]
        assert len(ours) == count and {*found} - {*ours} == {"flash"}
        for run in found.values():
            out = torch.empty_like(usual)
            assert run(qkv, 1, out=out) is out
            assert_close_to_reference(out, exact, same_dtype=same)


def test_candidates_of_attention_that_cannot_run_are_left_out() -> None:
    """TMA descriptors before Hopper; Hopper's tiles on other GPUs or for wider heads."""
    cuda = torch.device("cuda")
    half = torch.bfloat16
    with patch("torch.cuda.is_available", return_value=True), pytest.MonkeyPatch.context() as m:
        m.delenv("TRITON_INTERPRET", raising=False)
        for capability, d, ours, tma in (
            ((9, 0), 72, 3, 5), ((9, 0), 128, 1, 1), ((8, 0), 72, 1, 0), ((10, 0), 72, 1, 1),
        ):  # fmt: skip
            facts = SimpleNamespace(major=capability[0], multi_processor_count=132)
            m.setattr(torch.cuda, "get_device_capability", lambda _=None, c=capability: c)
            m.setattr(torch.cuda, "get_device_properties", lambda _, f=facts: f)
            m.setattr("dit_kernels.triton.attention.device_facts", lambda _, c=facts: (c.major, 1))
            found = dispatch.attention_candidates(64, 256, 16, d, half, cuda)
            assert sum("warps" in name for name in found) == ours + tma
            assert sum(name.startswith("tma") for name in found) == tma
            assert {"cudnn", "flash"} < {*found}
            assert "flash-attn" not in found


@interpreted
def test_what_depends_on_the_gpu() -> None:
    from dit_kernels.triton.attention import attention_tiles
    from dit_kernels.triton.quantize_rows import check_codes_on

    few, many = (attention_tiles(256, n * 16, 72, torch.bfloat16, 9, 132) for n in (2, 16))
    assert (few.queries, many.queries) == (64, 128)
    assert few.keys == many.keys  # so that an image's rounding does not depend on its batch
    assert attention_tiles(16, 8, 32, torch.bfloat16, 9, 132).queries == 16
    with patch("torch.cuda.get_device_capability", return_value=(8, 6)):
        check_codes_on(torch.device("cuda"), torch.int8)
        with pytest.raises(ValueError, match=r"8\.9 or later, cuda has 8\.6"):
            check_codes_on(torch.device("cuda"), FP8)


# On a GPU: full sizes, and inside a CUDA graph


@pytest.mark.gpu
@ALL_DTYPES
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_case_and_full_sizes(variant: str, dtype: torch.dtype) -> None:
    if variant == TMA and (CAPABILITY < (9, 0) or dtype == torch.float32):
        pytest.skip("descriptors need compute capability 9.0 and half precision")
    x, _, _, shift, scale = cases.row_inputs(4, 1024, 1152, dtype)  # XL at 512 pixels
    qkv = cases.qkv_of(16, 1024, 16, 72, dtype)  # enough images for tiles of 128 queries
    full = {
        "layernorm_modulate": (x, shift, scale, cases.EPS),
        "attention": (qkv, 16),
        TMA: (qkv, 16),
        "groupnorm_silu": (  # the decoder's largest
            cases.images((2, 128, 256, 256), dtype), 32,
            *cases.random(2, 128, dtype=dtype, seed=2), cases.EPS,
        ),
        "gelu": (cases.random(2, 256, 4608, dtype=dtype),),
    }  # fmt: skip
    with exact_float32():
        cases.check(launcher(variant), VARIANTS[variant], dtype, device="cuda")
        if variant in full:
            given = moved(full[variant], "cuda")
            exact, same = cases.definitions(VARIANTS[variant], given)
            assert_close_to_reference(launcher(variant)(*given), exact[0], same_dtype=same[0])


@pytest.mark.gpu
@pytest.mark.parametrize("codes", [torch.int8, FP8])
def test_quantize_rows_gives_the_references_codes(codes: torch.dtype) -> None:
    if codes == FP8 and CAPABILITY < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    x = cases.random(4, 37, 1152, dtype=torch.bfloat16)
    expected = reference.quantize_rows(x, codes)
    for a, b in zip(launcher("quantize_rows")(x.cuda(), codes), expected, strict=True):
        assert torch.equal(a.cpu().float(), b.float())


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_capture_in_a_graph(variant: str) -> None:
    if variant == TMA and CAPABILITY < (9, 0):
        pytest.skip("descriptors need compute capability 9.0")
    arguments = moved(next(cases.CASES[VARIANTS[variant]](torch.bfloat16)).arguments, "cuda")
    expected = launcher(variant)(*arguments)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = launcher(variant)(*arguments)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)


# What the package says about machines that cannot run it, and how it cuts rows into tiles


def test_why_the_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    available = patch("torch.cuda.is_available", return_value=True)
    found = patch("importlib.util.find_spec", return_value=SimpleNamespace(origin="triton"))
    with available, found, patch("torch.cuda.get_device_capability") as capability:
        # The descriptor variant needs Hopper, and "auto" never takes it.
        for version, why, why_tma in (
            ((7, 5), "compute capability 7.5: 8.0 is the oldest supported", None),
            ((8, 9), None, "compute capability 8.9: 9.0 is the oldest with TMA"),
            ((9, 0), None, None),
        ):
            capability.return_value = version
            assert triton.why_not(CUDA) == why
            if why is None:
                assert dispatch.why_not("triton-tma", "attention", CUDA) == why_tma
                assert dispatch.chosen("attention", "auto", CUDA) == "triton"
        assert triton.why_not("cpu") == "Triton kernels are for CUDA devices, not for cpu"
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # the interpreter takes tensors of the CPU
        assert triton.why_not(torch.device("cpu")) is None


def test_an_image_whose_offsets_do_not_fit_is_refused() -> None:
    launched: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: object) -> object:
            return lambda x: launched.append(tuple(x.shape))

    launch.launch(Kernel(), 1, torch.empty(64, 2**19, 1024, device="meta"))
    launch.launch(Kernel(), 1, torch.empty(2**40, 8, device="meta"))
    with pytest.raises(ValueError, match=r"^shape \(.*: .* images of up to 2147483647 num"):
        launch.launch(Kernel(), 1, torch.empty(3, 2**21, 1024, device="meta"))
    with pytest.raises(ValueError, match=r"^shape \(.*: .* up to 2147483643 rows"):
        launch.launch_rows(Kernel(), (torch.empty(2**16, 2**15, 1, device="meta"),), ())
    assert len(launched) == 2
