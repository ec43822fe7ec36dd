"""Progress bars that leave no stale line. It imports tqdm: import it where a bar is shown."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


class Bar(tqdm):  # pyright: ignore[reportMissingTypeArgument]
    """tqdm's bar, wiped away when it is closed before its end: by an exception, or by Ctrl-C."""

    def close(self) -> None:
        if not self.disable and self.total and self.n < self.total:
            self.leave = False
        super().close()


def close_all() -> None:
    """Close all open bars, also those of loops that an exception ended."""
    bars: Any = getattr(tqdm, "_instances", ())
    for bar in list(bars):
        bar.close()
