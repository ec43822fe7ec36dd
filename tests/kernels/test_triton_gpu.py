"""The launchers on a GPU: full sizes, against float64, and inside a CUDA graph."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import DTYPES, moved
from numerics import assert_close_to_reference, exact_float32
from test_triton_operators import FP8, VARIANTS, launcher

from dit_kernels import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
TMA = "attention_tma"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
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


@pytest.mark.parametrize("codes", [torch.int8, FP8])
def test_quantize_rows_gives_the_references_codes(codes: torch.dtype) -> None:
    if codes == FP8 and CAPABILITY < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    x = cases.random(4, 37, 1152, dtype=torch.bfloat16)
    expected = reference.quantize_rows(x, codes)
    for a, b in zip(launcher("quantize_rows")(x.cuda(), codes), expected, strict=True):
        assert torch.equal(a.cpu().float(), b.float())


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
