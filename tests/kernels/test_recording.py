"""Native calls that are recorded and made again."""

from __future__ import annotations

import threading

import pytest
import torch
from native_levels import needs_library, threads

from dit_kernels import reference
from dit_kernels.cpu import operators as native
from dit_kernels.cpu.recording import current, record

pytestmark = needs_library
__all__ = ["threads"]  # a fixture


def test_calls_are_made_again_on_what_their_memory_holds_by_then(threads: None) -> None:
    x, y, out = torch.randn(2, 3, 16), torch.randn(2, 3, 16), torch.empty(2, 3, 16)
    gate, shift = torch.randn(2, 16), torch.randn(2, 16)
    with record() as recording:
        native.gate_residual(x, y, gate, out=out)
        native.layernorm_modulate(out, shift, gate, 0.25, out=out)  # a float among the arguments
        native.gelu(out, out=out)
    assert len(recording) == 3 and current() is None
    for count in (1, 2):
        x.copy_(torch.randn_like(x))
        torch.set_num_threads(count)
        recording.replay()
        wide = [value.double() for value in (x, y, gate)]
        normed = reference.layernorm_modulate(
            reference.gate_residual(*wide), shift.double(), wide[2], 0.25
        )
        torch.testing.assert_close(out.double(), reference.gelu(normed), rtol=1e-5, atol=1e-6)
    recording._words[-2] = 2**64 - 1  # a count that is refused stands for memory that is missing
    with pytest.raises(MemoryError):
        recording.replay()


def test_only_this_threads_good_calls_are_recorded_and_only_while_it_records() -> None:
    x = torch.randn(4, 8)
    with record() as recording:
        other = threading.Thread(target=native.gelu, args=(x,))
        other.start()
        other.join()
        assert len(recording) == 0
        native.gelu(x)
        with pytest.raises(ValueError, match="not contiguous"):
            native.gelu(x.t())
        with pytest.raises(RuntimeError, match="under way"), record():
            pass
    native.gelu(x)
    assert len(recording) == 1 and current() is None
