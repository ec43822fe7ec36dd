"""Native calls that are recorded and made again."""

from __future__ import annotations

import threading

import pytest
import torch

from dit_kernels import reference
from dit_kernels.cpu import operators as native
from dit_kernels.cpu.recording import current, record

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}")


def test_calls_are_made_again_on_what_their_memory_holds_by_then() -> None:
    x, y, out = torch.randn(2, 3, 16), torch.randn(2, 3, 16), torch.empty(2, 3, 16)
    gate = torch.randn(2, 16)
    with record() as recording:
        native.gate_residual(x, y, gate, out=out)
        native.gelu(out, out=out)
    assert len(recording) == 2 and current() is None
    for threads in (1, 2):
        x.copy_(torch.randn_like(x))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            recording.replay()
        finally:
            torch.set_num_threads(before)
        wide = [value.double() for value in (x, y, gate)]
        expected = reference.gelu(reference.gate_residual(*wide))
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


def test_what_other_threads_call_is_not_recorded() -> None:
    x = torch.randn(4, 8)
    with record() as recording:
        other = threading.Thread(target=native.gelu, args=(x,))
        other.start()
        other.join()
        assert len(recording) == 0
        native.gelu(x)
    native.gelu(x)
    assert len(recording) == 1


def test_a_refused_call_is_not_recorded_and_the_recording_ends_with_an_error() -> None:
    with pytest.raises(ValueError, match="not contiguous"), record() as recording:
        native.gelu(torch.randn(4, 8).t())
    assert len(recording) == 0 and current() is None


def test_one_recording_at_a_time() -> None:
    with record(), pytest.raises(RuntimeError, match="under way"), record():
        pass
    assert current() is None


def test_no_memory_is_told_when_calls_are_made_again() -> None:
    x = torch.randn(4, 8)
    with record() as recording:
        native.gelu(x, out=x)
        native.gelu(x, out=x)
    recording.replay()
    recording._words[-2] = 2**64 - 1  # a count that is refused stands for memory that is missing
    with pytest.raises(MemoryError):
        recording.replay()
