"""The training loop that both stages share: budget, EMA, checkpoints, resumption, loss log."""

from __future__ import annotations

import csv
import math
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dit_engine.files import atomic_path, save_tensors

CHECKPOINT = "last.pt"


def kept_path(directory: Path, step: int) -> Path:
    """Where the EMA weights of ``step`` are, if it is one of `LoopSettings.keep_steps`."""
    return directory / f"ema-{step:06d}.safetensors"


@dataclass(frozen=True)
class Budget:
    """How long to train: a number of steps, or minutes of training time (resumptions counted in).

    The learning rate falls linearly to zero over the budget, whichever kind it is.
    """

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"steps {self.steps} and minutes {self.minutes}: give exactly one")
        value = self.steps if self.steps is not None else self.minutes
        if value is None or not value > 0 or not math.isfinite(value):
            raise ValueError(f"a training budget of {value} is not above 0")

    def progress(self, step: int, seconds: float) -> float:
        """Fraction of the budget that is spent, 0 to 1."""
        if self.steps is not None:
            return min(step / self.steps, 1.0)
        assert self.minutes is not None
        return min(seconds / (60.0 * self.minutes), 1.0)


@dataclass(frozen=True)
class LoopSettings:
    budget: Budget
    learning_rate: float
    warmup_steps: int = 100
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    save_seconds: float = 120.0
    sheet_seconds: float = 600.0
    seed: int = 0
    keep_steps: tuple[int, ...] = ()  # after which the EMA weights are kept in a file of their own


class Trainer:
    """AdamW on ``model`` with an EMA copy; everything that a resumption needs is in one file.

    Args:
        model: the float32 module to train.
        loss: (model, generator) → named scalar losses; "loss" is the one that is minimised.
            All its random draws come from the generator, which is seeded by (seed, step), so a
            resumed run draws what an uninterrupted one would have drawn.
        directory: receives last.pt, log.csv, loss.png and the sheets.
        sheet: (EMA model, path) → writes a picture of how far training is.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, torch.Generator], dict[str, Tensor]],
        settings: LoopSettings,
        directory: Path,
        sheet: Callable[[nn.Module, Path], None] | None = None,
    ) -> None:
        self.model, self.loss, self.settings, self.sheet = model, loss, settings, sheet
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trainable,
            settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay,
            fused=True,  # one pass over the weights; half of a small model's step otherwise
        )
        self.ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        if (directory / CHECKPOINT).exists():
            self._load()

    def run(self, description: str) -> nn.Module:
        """Train until the budget is spent; returns the model with its EMA weights."""
        settings, budget = self.settings, self.settings.budget
        saved = sheet_made = time.monotonic()
        window: list[dict[str, float]] = []
        generator = torch.Generator()
        bar = tqdm(desc=description, total=budget.steps, initial=self.step, unit="step")
        while (progress := budget.progress(self.step, self.seconds)) < 1.0:
            began = time.monotonic()
            warm = min(1.0, (self.step + 1) / settings.warmup_steps)
            rate = settings.learning_rate * warm * (1.0 - progress)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            generator.manual_seed(settings.seed * 1_000_003 + self.step)
            losses = self.loss(self.model, generator)
            self.optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            nn.utils.clip_grad_norm_(self.trainable, settings.gradient_clip)
            self.optimizer.step()
            self.step += 1
            self._update_ema()
            if self.step in settings.keep_steps:
                with atomic_path(kept_path(self.directory, self.step)) as partial:
                    save_tensors(self.ema, partial)
            now = time.monotonic()
            self.seconds += now - began
            window.append({k: float(v.detach()) for k, v in losses.items()})
            bar.update()
            if self.step % 50 == 0:
                self._log(window, rate)
                bar.set_postfix({k: f"{v:.4f}" for k, v in _mean(window).items()})
                window.clear()
            if now - saved > settings.save_seconds:
                self.save()
                saved = now
            if self.sheet and now - sheet_made > settings.sheet_seconds:
                self._make_sheet()
                sheet_made = time.monotonic()
        bar.close()
        self.save()
        self._make_sheet()
        self.model.load_state_dict(self.ema)
        return self.model.eval()

    def save(self) -> None:
        """Write last.pt (whole or not at all) and redraw the loss curve."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        with atomic_path(self.directory / CHECKPOINT) as path:
            torch.save(state, path)
        plot_losses(self.directory / "log.csv", self.directory / "loss.png")

    def _load(self) -> None:
        path = self.directory / CHECKPOINT
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"{path} is damaged: remove it to begin again") from error
        self.model.load_state_dict(state["model"])
        for name, average in self.ema.items():
            average.copy_(state["ema"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        _drop_rows_after(self.directory / "log.csv", self.step)

    @torch.no_grad()
    def _update_ema(self) -> None:
        # The short horizon at the start keeps the random initial weights out of the average.
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        averages, current = list(self.ema.values()), list(self.model.state_dict().values())
        torch._foreach_lerp_(averages, current, 1.0 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def _make_sheet(self) -> None:
        if self.sheet is None:
            return
        trained = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema)
        self.model.eval()
        self.sheet(self.model, self.directory / f"sheet-{self.step:06d}.png")
        self.model.train()
        self.model.load_state_dict(trained)

    def _log(self, window: list[dict[str, float]], rate: float) -> None:
        path = self.directory / "log.csv"
        row = {"step": self.step, "seconds": round(self.seconds, 1), "lr": rate, **_mean(window)}
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row.keys())
            if new:
                writer.writeheader()
            writer.writerow({k: f"{v:.6g}" for k, v in row.items()})


def _mean(window: list[dict[str, float]]) -> dict[str, float]:
    return {k: sum(row[k] for row in window) / len(window) for k in window[0]}


def _drop_rows_after(path: Path, step: int) -> None:
    """Forget what was logged after the checkpoint: those steps will be taken again."""
    if not path.exists():
        return
    header, *rows = path.read_text().splitlines()
    kept = [row for row in rows if int(float(row.split(",")[0])) <= step]
    with atomic_path(path) as partial:
        partial.write_text("\n".join([header, *kept]) + "\n")


def plot_losses(log: Path, picture: Path) -> None:
    """Draw every loss column of a log.csv against the step."""
    if not log.exists():
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return
    names = [n for n in rows[0] if n not in ("step", "seconds", "lr")]
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        axis.plot([float(r["step"]) for r in rows], [float(r[name]) for r in rows])
        axis.set(title=name, xlabel="step", yscale="log")
        axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    with atomic_path(picture) as partial:
        figure.savefig(partial, dpi=100, format="png")
    plt.close(figure)
