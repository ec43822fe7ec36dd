"""torch's random numbers on the CPU, without torch.

The generator is the Mersenne Twister (Matsumoto & Nishimura 1998). Normal numbers are made by the
transform of Box & Muller 1958 from the generator's outputs in torch's order, which is another one
for tensors of fewer than 16 numbers.
"""

from __future__ import annotations

import math

import numpy as np

_WORDS = 624
_BLOCK = 16


class TorchGenerator:
    """``torch.Generator().manual_seed(seed)``, which uses only the lower 32 bits of the seed."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.MT19937(0)
        key = _initial_words(seed & 0xFFFFFFFF)
        self._bits.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": _WORDS}}
        self._spare: float | None = None

    def randn(self, shape: tuple[int, ...]) -> np.ndarray:
        """``torch.randn(shape, generator=…)``, float32.

        The numbers are equal to torch's within the rounding of float32, because torch's vectorised
        logarithm and sine are not exact in the last bit.
        """
        size = math.prod(shape)
        return (self._few(size) if size < _BLOCK else self._many(size)).reshape(shape)

    def _many(self, size: int) -> np.ndarray:
        numbers = self._uniform(size)
        whole = size - size % _BLOCK
        numbers[:whole] = _box_muller(numbers[:whole])
        if whole < size:  # torch draws the last 16 anew, over those that are there
            numbers[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return numbers

    def _few(self, size: int) -> np.ndarray:
        """One by one in double precision; the second number of each pair is kept for the next."""
        numbers = np.empty(size, dtype=np.float32)
        for i in range(size):
            if self._spare is None:
                angle, size_squared = self._uniform_double(), self._uniform_double()
                radius = math.sqrt(-2.0 * math.log1p(-size_squared))
                numbers[i] = radius * math.cos(2.0 * math.pi * angle)
                self._spare = radius * math.sin(2.0 * math.pi * angle)
            else:
                numbers[i], self._spare = self._spare, None
        return numbers

    def _uniform(self, size: int) -> np.ndarray:
        """Numbers in [0, 1), float32, from the lower 24 bits of each word."""
        words = self._bits.random_raw(size) & 0xFFFFFF
        return words.astype(np.float32) * np.float32(2.0**-24)

    def _uniform_double(self) -> float:
        high, low = self._bits.random_raw(2).tolist()
        return (((high << 32) | low) & (2**53 - 1)) * 2.0**-53


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    """Blocks of 8 and 8 uniform numbers → blocks of 8 cosines and 8 sines."""
    first, second = np.moveaxis(uniform.reshape(-1, 2, _BLOCK // 2), 1, 0)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - first))
    angle = np.float32(2.0 * math.pi) * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


def _initial_words(seed: int) -> np.ndarray:
    """The generator's state for a seed: Knuth's recurrence, as in the published code."""
    words = [seed]
    for i in range(1, _WORDS):
        words.append((1812433253 * (words[-1] ^ (words[-1] >> 30)) + i) & 0xFFFFFFFF)
    return np.array(words, dtype=np.uint32)
