"""What the native kernels refuse: by a ValueError in Python, by a code in the C interface."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_levels import needs_library

from dit_kernels.cpu import loader as native_library
from dit_kernels.cpu import operators as native

pytestmark = needs_library
F32, BF16 = torch.float32, torch.bfloat16
X, Y = torch.zeros(2, 5, 8), torch.zeros(2, 5, 8)
ROW = torch.zeros(2, 8)
IMAGES = torch.zeros(1, 8, 4, 4).to(memory_format=torch.channels_last)
CHANNELS = torch.zeros(8)
LATENTS = torch.zeros(1, 4, 4, 4)
STEP = (torch.zeros(2, 4, 16), LATENTS, LATENTS, LATENTS, torch.zeros(1), torch.zeros(9))
ODD = torch.frombuffer(bytearray(4 * 81), dtype=F32, offset=1, count=80).view(2, 5, 8)

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "float64": (lambda: native.gelu(X.double()), "x has dtype torch.float64; allowed: float32"),
    "meta": (lambda: native.gelu(X.to("meta")), "x is on meta"),
    "transposed": (lambda: native.gelu(X.transpose(0, 1)), "strides .* is not contiguous"),
    "two dimensions": (
        lambda: native.layernorm_modulate(X[0], ROW, ROW, 1e-6), r"x has shape \(5, 8\)",
    ),
    "width zero": (
        lambda: native.layernorm_modulate(X[..., :0], ROW[:, :0], ROW[:, :0], 1e-6), "D > 0",
    ),
    "shift's shape": (
        lambda: native.layernorm_modulate(X, ROW[:1], ROW, 1e-6), r"shift has shape \(1, 8\)",
    ),
    "scale's dtype": (
        lambda: native.layernorm_modulate(X, ROW, ROW.double(), 1e-6), "scale has dtype",
    ),
    "gate's stride": (
        lambda: native.gate_residual(X, Y, torch.zeros(8, 2).t()), "gate has stride 2",
    ),
    "y's dtype": (
        lambda: native.gate_residual(X, Y.bfloat16(), ROW), "y has dtype torch.bfloat16",
    ),
    "y's shape": (lambda: native.gate_residual(X, Y[:1], ROW), r"y has shape \(1, 5, 8\)"),
    "out's shape": (
        lambda: native.layernorm_modulate(X, ROW, ROW, 1e-6, out=Y[:1]), "out is torch.float32",
    ),
    "out's dtype": (lambda: native.gelu(X, out=Y.bfloat16()), "out is torch.bfloat16"),
    "out's strides": (
        lambda: native.gelu(X, out=torch.zeros(8, 5, 2).permute(2, 1, 0)), "not contiguous",
    ),
    "one out of two": (
        lambda: native.gate_residual_layernorm_modulate(X, Y, ROW, ROW, ROW, 1e-6, out=(X,)),
        "out has 1 tensors; 2 are needed",
    ),
    "an odd address": (lambda: native.gelu(ODD), "dit_gelu refused a tensor whose address"),
    "an odd address of out": (
        lambda: native.gate_residual(X, Y, ROW, out=ODD), "refused a tensor whose address",
    ),
    "codes of a type": (
        lambda: native.quantize_rows(X, torch.int16), "choose torch.int8 or torch.uint8",
    ),
    "a single number": (lambda: native.quantize_rows(X[0, 0, 0]), r"x has shape \(\)"),
    "bias's shape": (lambda: native.bias_gelu(X, CHANNELS[:3]), r"bias is torch.float32 \(3,\)"),
    "narrow to wide": (
        lambda: native.bias_gelu(X.bfloat16(), CHANNELS, F32), "x has dtype torch.bfloat16",
    ),
    "row scales": (
        lambda: native.dequantize_rows(X[0], CHANNELS), r"row_scales .*; float32 \(5,\)",
    ),
    "col offset": (
        lambda: native.dequantize_rows(X[0], torch.ones(5), col_offset=CHANNELS),
        "col_offset is torch.float32",
    ),
    "acc's type": (
        lambda: native.dequantize_rows(X[0].bfloat16(), torch.ones(5), dtype=F32),
        "acc has dtype torch.bfloat16",
    ),
    "acc's dimensions": (lambda: native.dequantize_rows(X, torch.ones(5)), "acc has shape"),
    "channels first": (
        lambda: native.groupnorm_silu(IMAGES.contiguous(), 2, CHANNELS, CHANNELS, 1e-6),
        "channels_last",
    ),
    "groups": (
        lambda: native.groupnorm_silu(IMAGES, 3, CHANNELS, CHANNELS, 1e-6),
        "groups 3 does not divide the 8 channels",
    ),
    "no groups": (lambda: native.groupnorm_silu(IMAGES, 0, CHANNELS, CHANNELS, 1e-6), "groups 0"),
    "bias of another dtype": (
        lambda: native.groupnorm_silu(IMAGES, 2, CHANNELS, CHANNELS.bfloat16(), 1e-6),
        "bias has dtype torch.bfloat16",
    ),
    "tokens": (
        lambda: native.guided_step(torch.zeros(2, 3, 16), *STEP[1:], 3, 2),
        r"tokens has shape \(2, 3, 16\)",
    ),
    "patch": (lambda: native.guided_step(*STEP, 3, 3), "patch_size 3"),
    "no patch": (lambda: native.guided_step(*STEP, 3, 0), "patch_size 0"),
    "guided channels": (lambda: native.guided_step(*STEP, 5, 2), "guided_channels 5"),
    "latents": (
        lambda: native.guided_step(STEP[0], LATENTS.bfloat16(), *STEP[2:], 3, 2), "z has dtype",
    ),
    "coefficients": (
        lambda: native.guided_step(*STEP[:5], torch.zeros(8), 3, 2), "coefficients is",
    ),
    "heads": (lambda: native.attention(torch.zeros(1, 4, 72), 5), "num_heads 5"),
    "no heads": (lambda: native.attention(torch.zeros(1, 4, 72), 0), "num_heads 0"),
    "head dimension": (
        lambda: native.attention(torch.zeros(1, 4, 3 * 136), 1), "multiples of 8 up to 128",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


MEMORY = ctypes.create_string_buffer(1 << 16)
SIZES = {  # where not every size may be 2
    "dit_guided_step": [2, 1, 2, 2, 2, 1, 1],
    "dit_attention": [1, 2, 1, 8],
}


def arguments(name: str) -> tuple[list[Any], str]:
    """Good arguments on that memory, and the kind of each."""
    _, letters = native_library.prototypes()[name]
    sizes = iter(SIZES.get(name, [2] * letters.count("q")))
    address = (ctypes.addressof(MEMORY) + 63) // 64 * 64
    of_letter = {
        "p": lambda: address,
        "q": lambda: next(sizes),
        "i": lambda: 0,
        "f": lambda: 1e-6,
    }
    values: list[Any] = [of_letter[letter]() for letter in letters]
    values[-1] = 1
    return values, letters


def call(name: str, values: list[Any]) -> int:
    library, _ = native_library.load()
    return getattr(library, name)(*values)


# Those of packed weights, which need other alignments, are in test_native_product.py; what is made
# again was checked when it was recorded.
LOADING = ("dit_interface", "dit_isa", "dit_set_isa", "dit_replay")
PACKED = ("dit_packed_bytes", "dit_pack_weight", "dit_linear", "dit_linear_int8")
FUNCTIONS = [name for name in native_library.prototypes() if name not in (*LOADING, *PACKED)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_codes_of_the_c_interface(name: str) -> None:
    good, letters = arguments(name)
    assert call(name, good) == 0
    pointers = [i for i, letter in enumerate(letters) if letter == "p"]
    sizes = [i for i, letter in enumerate(letters) if letter == "q"]
    optional = {"dit_gelu_quantize": [1], "dit_dequantize_rows": [2, 3, 4]}.get(name, [])
    codes = {
        "dit_layernorm_modulate_quantize": 3,
        "dit_gate_residual_layernorm_modulate_quantize": 6,
        "dit_quantize_rows": 1,
        "dit_gelu_quantize": 2,
    }.get(name)
    for i in pointers:
        code = call(name, [None if k == i else v for k, v in enumerate(good)])
        assert code == (0 if i in optional else -1), i
        code = call(name, [v + 1 if k == i else v for k, v in enumerate(good)])
        assert code == (0 if i == codes else -5), i
    for i in sizes:
        for size in (-1, -(2**63), 2**62, 2**63 - 1):
            code = call(name, [size if k == i else v for k, v in enumerate(good)])
            assert code in (-2, -7), (i, size)
    last = len(good) - 1
    for threads in (0, -3):
        assert call(name, [threads if k == last else v for k, v in enumerate(good)]) == -4
    first_dtype = last - letters[::-1].index("q" if "f" not in letters else "f") + 1
    for dtype in (-1, 4, 77):
        code = call(name, [dtype if k == first_dtype else v for k, v in enumerate(good)])
        assert code == -3, dtype


def test_an_odd_modulation_dtype_is_refused_by_the_c_interface() -> None:
    name = "dit_gate_residual_layernorm_modulate"
    good, letters = arguments(name)
    for i in range(len(letters) - 4, len(letters) - 1):
        assert call(name, [3 if k == i else v for k, v in enumerate(good)]) == -3
