"""What the native kernels refuse: by a ValueError in Python, by a code in the C interface.

Only what the public operators do not check: they share the rest, which test_operators.py tries.
"""

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
X, ROW, CHANNELS = torch.zeros(2, 5, 8), torch.zeros(2, 8), torch.zeros(8)
IMAGES = torch.zeros(1, 8, 4, 4).to(memory_format=torch.channels_last)
LATENTS = torch.zeros(1, 4, 4, 4)
ODD = torch.frombuffer(bytearray(4 * 81), dtype=torch.float32, offset=1, count=80).view(2, 5, 8)
GROUPS = (IMAGES, 2, CHANNELS, CHANNELS, 1e-6)

REFUSED: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
    (native.gelu, (X.to("meta"),), {}, "^x is on meta"),
    (native.gelu, (X.transpose(0, 1),), {}, r"^x of strides .* is not contiguous$"),
    (native.gelu, (ODD,), {}, "^dit_gelu refused a tensor whose address"),
    (native.gelu, (X,), {"out": X.bfloat16()}, r"^out is torch\.bfloat16"),
    (native.gate_residual_layernorm_modulate, (X, X, ROW, ROW, ROW, 1e-6), {"out": (X,)},
     "^out has 1 tensors; 2 are needed"),
    (native.quantize_rows, (X, torch.int16), {}, r"choose torch\.int8 or torch\.uint8"),
    (native.dequantize_rows, (X[0], CHANNELS, CHANNELS, False), {}, r"^scales .*; float32 \(5\)"),
    (native.groupnorm_silu, (IMAGES.bfloat16(), 2, CHANNELS, CHANNELS.bfloat16(), 1e-6), {},
     r"^bias is torch\.bfloat16 .*; float32"),
    (native.groupnorm_silu, GROUPS, {"out": IMAGES.contiguous()}, "^out of strides"),
    (native.embed, (LATENTS, ROW, CHANNELS, ROW, 2), {}, r"^weight is .*; float32 \(16, 8\)"),
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
OTHERS = ("dit_interface", "dit_isa", "dit_set_isa", "dit_replay", "dit_packed_bytes",
          "dit_pack_weight", "dit_linear", "dit_linear_int8")  # fmt: skip
FUNCTIONS = [name for name in loader.prototypes() if name not in OTHERS]


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
        return getattr(loader.loaded(), name)(*good[:i], value, *good[i:][1:])

    assert code() == 0
    for i, letter in enumerate(letters):
        if letter == "p":
            assert code(i, None) == -1, i
            assert code(i, address + 1) == (0 if i == CODES.get(name) else -5), i
        if letter == "q":
            assert {code(i, size) for size in (-1, 2**62, 2**63 - 1)} <= {-2, -7}, i
    assert code(value=0) == -4  # threads
    first_dtype = max(letters.rfind("q"), letters.rfind("f")) + 1
    assert code(first_dtype, -1) == code(first_dtype, 3) == -3
    if name == "dit_gate_residual_layernorm_modulate":
        assert all(code(i, 3) == -3 for i in range(len(letters) - 4, len(letters) - 1))
    if name == "dit_attention":
        assert all(code(5, d) == -2 for d in (0, 12, 136))
