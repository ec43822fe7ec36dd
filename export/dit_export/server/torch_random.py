"""torch's normal random numbers on the CPU, without torch.

The generator is the Mersenne Twister (Matsumoto & Nishimura 1998). Normal numbers are made by the
transform of Box & Muller 1958 from the generator's outputs in torch's order.
"""

from __future__ import annotations

import math

import numpy as np

_BLOCK = 16


class TorchGenerator:
    """``torch.Generator().manual_seed(seed)``, which uses only the lower 32 bits of the seed."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.MT19937()
        np.random.RandomState(self._bits).seed(seed & 0xFFFFFFFF)  # by Knuth's recurrence

    def randn(self, shape: tuple[int, ...]) -> np.ndarray:
        """``torch.randn(shape, generator=…)``, float32.

        The numbers are equal to torch's within the rounding of float32, because torch's vectorised
        logarithm and sine are not exact in the last bit. Raises ValueError for fewer than 16
        numbers, which torch makes in another way.
        """
        size = math.prod(shape)
        if size < _BLOCK:
            raise ValueError(f"noise of shape {shape}: at least {_BLOCK} numbers are needed")
        numbers = self._uniform(size)
        whole = size - size % _BLOCK
        numbers[:whole] = _box_muller(numbers[:whole])
        if whole < size:  # torch draws the last 16 anew, over those that are there
            numbers[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return numbers.reshape(shape)

    def _uniform(self, size: int) -> np.ndarray:
        """Numbers in [0, 1), float32, from the lower 24 bits of each word."""
        words = self._bits.random_raw(size) & 0xFFFFFF
        return words.astype(np.float32) * np.float32(2.0**-24)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    """Blocks of 8 and 8 uniform numbers → blocks of 8 cosines and 8 sines."""
    first, second = np.moveaxis(uniform.reshape(-1, 2, _BLOCK // 2), 1, 0)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - first))
    angle = np.float32(2.0 * math.pi) * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
