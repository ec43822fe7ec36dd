"""Progress bars that leave no stale line. It imports tqdm: import it where a bar is shown."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from dit_engine.io.printable import printable


class Bar(tqdm):  # pyright: ignore[reportMissingTypeArgument]
    """tqdm's bar with `printable` text. If an exception or Ctrl-C closes it before its end, it is
    cleared."""

    def __init__(self, iterable: Any = None, desc: str | None = None, *more: Any, **options: Any):
        super().__init__(iterable, desc and printable(desc), *more, **options)

    def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
        super().set_description(desc and printable(desc), refresh)

    def set_description_str(self, desc: str | None = None, refresh: bool | None = True) -> None:
        super().set_description_str(desc and printable(desc), refresh)

    def close(self) -> None:
        if not self.disable and self.total and self.n < self.total:
            self.leave = False
        super().close()
