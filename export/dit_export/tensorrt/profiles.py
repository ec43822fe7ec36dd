"""Optimisation profiles, for builder and runtime: the batches and sizes that an engine takes.

A profile is written "1,2,8" (smallest, best and largest batch). Graphs whose size is free also need
the sides of the latents, such as "32,64,96".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
"""By tensor name; -1 is free."""


@dataclass(frozen=True)
class Range:
    """Smallest, best and largest: positive, and in this order."""

    smallest: int
    best: int
    largest: int

    def __post_init__(self) -> None:
        if not 1 <= self.smallest <= self.best <= self.largest:
            raise ValueError(
                f"range {astuple(self)}: smallest, best and largest must be positive and in order"
            )

    @classmethod
    def parse(cls, text: str, name: str) -> Range:
        """ "1,2,8", or "4" for 4,4,4. Raises ValueError, which names ``name`` and the text."""
        try:
            numbers = [int(part) for part in text.split(",")]
            return cls(*numbers * 3 if len(numbers) == 1 else numbers)
        except (ValueError, TypeError):
            raise ValueError(
                f"{name} {text!r}: give one positive number, or three in order, as in 1,2,8"
            ) from None

    def __contains__(self, value: int) -> bool:
        return self.smallest <= value <= self.largest

    def __str__(self) -> str:
        if self.smallest == self.largest:
            return str(self.best)
        return f"{self.smallest} to {self.largest} (best at {self.best})"


@dataclass(frozen=True)
class Profile:
    """batch: rows of every input; size: both sides of a latent, for graphs that take any."""

    batch: Range
    size: Range | None = None

    def shapes(self, shape: Shape) -> tuple[Shape, Shape, Shape]:
        """An input's shape, with -1 for free dimensions (the batch first) → the smallest, the best
        and the largest shape."""
        sides = (0, 0, 0) if self.size is None else astuple(self.size)

        def at(batch: int, side: int) -> Shape:
            free = [batch] + [side] * (len(shape) - 1)
            return tuple(f if n == -1 else n for n, f in zip(shape, free, strict=True))

        smallest, best, largest = map(at, astuple(self.batch), sides)
        return smallest, best, largest

    def __str__(self) -> str:
        return f"batch {self.batch}" + ("" if self.size is None else f", size {self.size}")


Profiles = tuple[Profile, ...]


def parse_profiles(batches: Sequence[str], size: str | None = None) -> Profiles:
    """One profile for every batch range; all have the same sizes.

    Raises ValueError for a text that is not a range, and for a range that is given twice.
    """
    sides = None if size is None else Range.parse(size, "size")
    profiles = tuple(Profile(Range.parse(text, "batch"), sides) for text in batches)
    if len(set(profiles)) < len(profiles):
        raise ValueError(f"batch {' '.join(batches)}: a range is given twice")
    return profiles


def choose_profile(profiles: Profiles, inputs: Shapes, given: Shapes) -> int:
    """The index of the narrowest profile that holds inputs of these shapes.

    inputs: the engine's own shapes. Raises ValueError, which names these shapes and the profiles.
    """

    def holds(profile: Profile) -> bool:
        for name, shape in given.items():
            low, _, high = profile.shapes(inputs[name])
            inside = [a <= n <= b for a, n, b in zip(low, shape, high, strict=False)]
            if len(shape) != len(low) or not all(inside):
                return False
        return True

    same = given.keys() == inputs.keys() and len({shape[:1] for shape in given.values()}) == 1
    fitting = [i for i, profile in enumerate(profiles) if same and holds(profile)]
    if not fitting:
        allowed = "; ".join(map(str, profiles))
        raise ValueError(
            f"inputs {dict(given)} do not fit the engine, which takes {dict(inputs)} (-1 is free) "
            f"of one batch in {allowed}"
        )
    return min(fitting, key=lambda i: profiles[i].batch.largest - profiles[i].batch.smallest)
