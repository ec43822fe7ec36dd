"""Optimisation profiles: the batches and sizes that an engine takes, for builder and runtime alike.

A profile is written "1,2,8" (smallest, best and largest batch). Graphs whose size is free also need
the sides of the latents, such as "32,64,96".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Range:
    """Smallest, best and largest: positive, and in this order."""

    smallest: int
    best: int
    largest: int

    def __post_init__(self) -> None:
        if not 1 <= self.smallest <= self.best <= self.largest:
            raise ValueError(
                f"range {self.smallest},{self.best},{self.largest}: "
                "smallest, best and largest must be positive and in this order"
            )

    @classmethod
    def parse(cls, text: str, name: str = "range") -> Range:
        """ "1,2,8", or "4" for 4,4,4. Raises ValueError, which names ``name`` and the text."""
        try:
            numbers = [int(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 3):
            raise ValueError(f"{name} {text!r}: give one number or three, as in 1,2,8")
        try:
            return cls(*numbers if len(numbers) == 3 else numbers * 3)
        except ValueError as error:
            raise ValueError(f"{name} {text!r}: {error}") from None

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

    def holds(self, batch: int, size: Sequence[int] = ()) -> bool:
        """size: the free sides of an input, none for a graph whose size is fixed."""
        sides_fit = self.size is None or all(side in self.size for side in size)
        return batch in self.batch and sides_fit

    def shapes(self, shape: Shape) -> tuple[Shape, Shape, Shape]:
        """An input's shape, with -1 for free dimensions (the batch first) → the smallest, the best
        and the largest shape. Raises ValueError if a side is free and this profile has no size."""
        if -1 in shape[1:] and self.size is None:
            raise ValueError("a graph whose size is free needs a profile with a size")
        sides = (0, 0, 0) if self.size is None else astuple(self.size)

        def at(batch: int, side: int) -> Shape:
            free = [batch] + [side] * (len(shape) - 1)
            return tuple(f if n == -1 else n for n, f in zip(shape, free, strict=True))

        smallest, best, largest = map(at, astuple(self.batch), sides)
        return smallest, best, largest

    def to_dict(self) -> dict[str, list[int] | None]:
        size = None if self.size is None else list(astuple(self.size))
        return {"batch": list(astuple(self.batch)), "size": size}

    @classmethod
    def from_dict(cls, values: Mapping[str, Sequence[int] | None]) -> Profile:
        batch, size = values["batch"], values["size"]
        if batch is None:
            raise ValueError("a profile needs a batch")
        return cls(Range(*batch), None if size is None else Range(*size))

    def __str__(self) -> str:
        side = "" if self.size is None else f", size {self.size}"
        return f"batch {self.batch}{side}"


Profiles = tuple[Profile, ...]


def parse_profiles(batches: Sequence[str], size: str | None = None) -> Profiles:
    """One profile for every batch range; all have the same sizes.

    Raises ValueError for what is not a range, and for a range that is given twice.
    """
    if not batches:
        raise ValueError("batch: give at least one range, as in 1,2,8")
    sides = None if size is None else Range.parse(size, "size")
    profiles = tuple(Profile(Range.parse(text, "batch"), sides) for text in batches)
    if len(set(profiles)) < len(profiles):
        raise ValueError(f"batch {' '.join(batches)}: a range is given twice")
    return profiles


def choose_profile(profiles: Profiles, batch: int, size: Sequence[int] = ()) -> int:
    """The index of the narrowest profile that holds a batch of that many rows.

    Raises ValueError, which names the profiles, if none does.
    """
    fitting = [i for i, profile in enumerate(profiles) if profile.holds(batch, size)]
    if not fitting:
        sides = f" of {'×'.join(map(str, size))}" if size else ""
        allowed = "; ".join(map(str, profiles))
        raise ValueError(f"batch {batch}{sides} is outside the engine's profile: {allowed}")
    return min(fitting, key=lambda i: profiles[i].batch.largest - profiles[i].batch.smallest)
