"""What the native kernels refuse: by a ValueError in Python, by a code in the C interface."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_levels import needs_library

from dit_kernels.cpu import loader
from dit_kernels.cpu import operators as native

pytestmark = needs_library
X, Y = torch.zeros(2, 5, 8), torch.zeros(2, 5, 8)
ROW, FIVE = torch.zeros(2, 8), torch.ones(5)
IMAGES = torch.zeros(1, 8, 4, 4).to(memory_format=torch.channels_last)
CHANNELS = torch.zeros(8)
LATENTS = torch.zeros(1, 4, 4, 4)
STEP = (torch.zeros(2, 4, 16), LATENTS, LATENTS, LATENTS, torch.zeros(1), torch.zeros(9))
ODD = torch.frombuffer(bytearray(4 * 81), dtype=torch.float32, offset=1, count=80).view(2, 5, 8)

# What the public operators check as well, test_operators.py tries.
REFUSED: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
    (native.gelu, (X.double(),), {}, "x has dtype torch.float64; allowed: float32"),
    (native.gelu, (X.to("meta"),), {}, "x is on meta"),
    (native.gelu, (X.transpose(0, 1),), {}, r"strides .* is not contiguous"),
    (native.gelu, (ODD,), {}, "dit_gelu refused a tensor whose address"),
    (native.gelu, (X,), {"out": Y.bfloat16()}, r"out is torch\.bfloat16"),
    (native.gelu, (X,), {"out": torch.zeros(8, 5, 2).permute(2, 1, 0)}, "not contiguous"),
    (native.layernorm_modulate, (X.to("meta"), ROW, ROW, 1e-6), {}, "x is on meta"),
    (native.layernorm_modulate, (X[0], ROW, ROW, 1e-6), {}, r"x has shape \(5, 8\)"),
    (native.layernorm_modulate, (X, ROW[:1], ROW, 1e-6), {}, r"shift has shape \(1, 8\)"),
    (native.layernorm_modulate, (X, ROW, ROW.double(), 1e-6), {}, "scale has dtype"),
    (native.layernorm_modulate, (X, ROW, ROW, 1e-6), {"out": Y[:1]}, r"out is .* \(1, 5, 8\)"),
    (native.gate_residual, (X, Y, torch.zeros(8, 2).t()), {}, "gate has stride 2"),
    (native.gate_residual, (X, Y.bfloat16(), ROW), {}, r"y has dtype torch\.bfloat16"),
    (native.gate_residual, (X, Y[:1], ROW), {}, r"y has shape \(1, 5, 8\)"),
    (native.gate_residual, (X, Y, ROW), {"out": ODD}, "refused a tensor whose address"),
    (native.gate_residual_layernorm_modulate, (X, Y, ROW, ROW, ROW, 1e-6), {"out": (X,)},
     "out has 1 tensors; 2 are needed"),
    (native.quantize_rows, (X, torch.int16), {}, r"choose torch\.int8 or torch\.uint8"),
    (native.quantize_rows, (X[0, 0, 0],), {}, r"x has shape \(\)"),
    (native.dequantize_rows, (X[0], CHANNELS, CHANNELS, False), {}, r"scales .*; float32 \(5,\)"),
    (native.dequantize_rows, (X[0], FIVE, FIVE, False), {}, r"bias is torch\.float32 \(5,\)"),
    (native.dequantize_rows, (X[0].int(), FIVE, CHANNELS, False), {}, r"x is torch\.int32"),
    (native.dequantize_rows, (X, FIVE, CHANNELS, False), {}, "x has shape"),
    (native.groupnorm_silu, (IMAGES.contiguous(), 2, CHANNELS, CHANNELS, 1e-6), {},
     "channels_last"),
    (native.groupnorm_silu, (IMAGES, 0, CHANNELS, CHANNELS, 1e-6), {}, "groups 0"),
    (native.groupnorm_silu, (IMAGES, 2, CHANNELS, CHANNELS.bfloat16(), 1e-6), {},
     r"bias has dtype torch\.bfloat16"),
    (native.groupnorm_silu, (IMAGES, 2, CHANNELS, CHANNELS, 1e-6), {"out": IMAGES.contiguous()},
     "out is not in"),
    (native.guided_step, (*STEP, 3, 0), {}, "patch_size 0"),
    (native.guided_step, (STEP[0], LATENTS.bfloat16(), *STEP[2:], 3, 2), {}, "z has dtype"),
    (native.embed, (LATENTS, ROW, CHANNELS, ROW, 2), {}, r"weight is .*; float32 \(16, 8\)"),
    (native.attention, (torch.zeros(1, 4, 72), 0), {}, "num_heads 0"),
    (native.attention, (torch.zeros(1, 4, 72, device="meta"), 3), {}, "qkv is on meta"),
]  # fmt: skip


@pytest.mark.parametrize(("run", "arguments", "options", "message"), REFUSED)
def test_refused_in_one_line(
    run: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        run(*arguments, **options)
    assert "\n" not in str(raised.value)


MEMORY = ctypes.create_string_buffer(1 << 16)
SIZES = {  # where not every size may be 2
    "dit_guided_step": [2, 1, 2, 2, 2, 1, 1],
    "dit_attention": [1, 2, 1, 8],
}
CODES = {  # pointers to bytes, which need no alignment
    "dit_layernorm_modulate_quantize": 3,
    "dit_gate_residual_layernorm_modulate_quantize": 6,
    "dit_quantize_rows": 1,
}
# Those of packed weights, which need other alignments, are in test_native_product.py; what is made
# again was checked when it was recorded.
LOADING = ("dit_interface", "dit_isa", "dit_set_isa", "dit_replay")
PACKED = ("dit_packed_bytes", "dit_pack_weight", "dit_linear", "dit_linear_int8")
FUNCTIONS = [name for name in loader.prototypes() if name not in (*LOADING, *PACKED)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_codes_of_the_c_interface(name: str) -> None:
    _, letters = loader.prototypes()[name]
    sizes = iter(SIZES.get(name, [2] * letters.count("q")))
    address = (ctypes.addressof(MEMORY) + 63) // 64 * 64
    good: list[Any] = [
        next(sizes) if letter == "q" else {"p": address, "i": 0, "f": 1e-6}[letter]
        for letter in letters
    ]
    good[-1] = 1

    def code(i: int = -1, value: Any = 1) -> int:
        values = list(good)
        values[i] = value
        return getattr(loader.load()[0], name)(*values)

    assert code() == 0
    for i, letter in enumerate(letters):
        if letter == "p":
            assert code(i, None) == -1, i
            assert code(i, address + 1) == (0 if i == CODES.get(name) else -5), i
        if letter == "q":
            for size in (-1, -(2**63), 2**62, 2**63 - 1):
                assert code(i, size) in (-2, -7), (i, size)
    assert code(value=0) == code(value=-3) == -4  # threads
    first_dtype = max(letters.rfind("q"), letters.rfind("f")) + 1
    for dtype in (-1, 3, 77):
        assert code(first_dtype, dtype) == -3, dtype
    if name == "dit_gate_residual_layernorm_modulate":
        for i in range(len(letters) - 4, len(letters) - 1):  # of gate, shift and scale
            assert code(i, 3) == -3
    if name == "dit_attention":
        for d in (0, 12, 136):
            assert code(5, d) == -2
