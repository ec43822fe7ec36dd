"""The training loop that both stages share: budget, checkpoints, resumption, log of losses, and
the exponential moving average (EMA) of the weights, which is what a stage returns."""

from __future__ import annotations

import math
import pickle
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from dit_engine.checkpoint.archives import check_file
from dit_engine.console.bars import Bar
from dit_engine.io.files import atomic_path, save_tensors
from dit_engine.training.log import add_row, drop_rows_after, plot_losses
from dit_engine.training.stopping import Stopped, signals_noted
from dit_engine.training.threads import ThreadsByLoad

M = TypeVar("M", bound=nn.Module)

CHECKPOINT = "last.pt"
LOG_STEPS = 50  # a row of the log and the losses that are shown are means of this many steps
_SHEET_SECONDS = 600.0


def kept_path(directory: Path, step: int) -> Path:
    """Where the EMA weights of ``step`` are, if it is one of `LoopSettings.keep_steps`."""
    return directory / f"ema-{step:06d}.safetensors"


@dataclass(frozen=True)
class Budget:
    """How long to train: a number of steps, or minutes of training over all resumptions.

    The learning rate falls linearly to zero over the budget.
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
        """The fraction of the budget that is spent, 0 to 1."""
        spent, whole = (step, self.steps) if self.steps else (seconds, 60.0 * (self.minutes or 0))
        return min(spent / whole, 1.0)


@dataclass(frozen=True)
class LoopSettings:
    """How `Trainer` trains.

    warmup_steps: how many steps the learning rate rises. ema_decay: of the average of the
    weights. save_seconds: the time between two checkpoints. keep_steps: steps after which the EMA
    weights are kept in a file of their own. follow_load: on the CPU, `ThreadsByLoad` sets the
    number of torch's threads.
    """

    budget: Budget
    learning_rate: float
    warmup_steps: int = 100
    ema_decay: float = 0.999
    save_seconds: float = 120.0
    seed: int = 0
    keep_steps: tuple[int, ...] = ()
    follow_load: bool = False


class Trainer(Generic[M]):
    """Trains ``model`` with AdamW. One file holds everything that is needed to go on later.

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
        model: M,
        loss: Callable[[M, torch.Generator], dict[str, Tensor]],
        settings: LoopSettings,
        directory: Path,
        sheet: Callable[[M, Path], None] | None = None,
    ) -> None:
        self.model, self.loss, self.settings, self.sheet = model, loss, settings, sheet
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        # Fused, because AdamW otherwise takes half of a small model's step.
        self.optimizer = torch.optim.AdamW(
            self.trainable, settings.learning_rate, (0.9, 0.99), weight_decay=0.0, fused=True
        )
        self.ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        self.losses: dict[str, float] = {}  # the means of the last steps
        if (directory / CHECKPOINT).exists():
            self._load()

    def run(self, description: str) -> M:
        """Train until the budget is spent; returns the model with its EMA weights.

        Ctrl-C and SIGTERM end it after the current step: the checkpoint is written, and `Stopped`
        is raised.
        """
        on_cpu = all(parameter.device.type == "cpu" for parameter in self.trainable)
        by_load = ThreadsByLoad() if self.settings.follow_load and on_cpu else None
        line = Bar(
            total=1.0, initial=self.settings.budget.progress(self.step, self.seconds),
            bar_format="{desc} |{bar}| {percentage:.0f}%, {remaining} left",
            # In a file every update is a new line, so there are few of them.
            mininterval=0.2 if sys.stderr.isatty() else 30.0,
        )  # fmt: skip
        announcement = f"{description}: stopping after this step (Ctrl-C again: at once)"
        try:
            with closing(line), signals_noted(announcement) as signal_noted:
                self._train(description, line, by_load, signal_noted)
                self.save()
                if number := signal_noted():
                    raise Stopped(f"{description}: stopped after {self.step} steps, saved", number)
                self._make_sheet()
                if number := signal_noted():
                    raise Stopped(f"{description}: stopped after its last step, saved", number)
        finally:
            if by_load is not None:
                by_load.restore()
        self.model.load_state_dict(self.ema)
        return self.model.eval()

    def _train(
        self, description: str, line: Bar, by_load: ThreadsByLoad | None,
        signal_noted: Callable[[], int],
    ) -> None:  # fmt: skip
        """Take steps until the budget is spent or a signal was noted."""
        budget, save_seconds = self.settings.budget, self.settings.save_seconds
        saved = sheet_made = time.monotonic()
        window: deque[dict[str, float]] = deque(maxlen=LOG_STEPS)
        while (progress := budget.progress(self.step, self.seconds)) < 1.0 and not signal_noted():
            began = time.monotonic()
            if by_load is not None:
                by_load.update()
            rate, losses = self._take_step(progress)
            now = time.monotonic()
            self.seconds += now - began
            window.append(losses)
            self.losses = {k: sum(row[k] for row in window) / len(window) for k in losses}
            of_all = f" of {budget.steps}" if budget.steps is not None else ""
            text = f"{description}: step {self.step}{of_all}, loss {self.losses['loss']:.4f}"
            line.set_description_str(text, refresh=False)
            line.update(budget.progress(self.step, self.seconds) - line.n)
            if self.step % LOG_STEPS == 0:
                row = {"step": self.step, "seconds": round(self.seconds, 1), "lr": rate}
                add_row(self.directory / "log.csv", row | self.losses)
            if now - saved > save_seconds:
                self.save()
                saved = now
            if self.sheet and now - sheet_made > _SHEET_SECONDS:
                self._make_sheet()
                sheet_made = time.monotonic()

    def _take_step(self, progress: float) -> tuple[float, dict[str, float]]:
        """One step of the optimiser and of the average: the learning rate and the losses."""
        settings = self.settings
        rate = settings.learning_rate * min(1.0, (self.step + 1) / settings.warmup_steps)
        rate *= 1.0 - progress
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + self.step)
        losses = self.loss(self.model, generator)
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        self.step += 1
        # The small decay at the start keeps the random initial weights out of the average.
        decay = min(settings.ema_decay, (1 + self.step) / (10 + self.step))
        averages, current = list(self.ema.values()), list(self.model.state_dict().values())
        with torch.no_grad():
            torch._foreach_lerp_(averages, current, 1.0 - decay)  # pyright: ignore[reportPrivateImportUsage]
        if self.step in settings.keep_steps:
            save_tensors(self.ema, kept_path(self.directory, self.step))
        return rate, {k: float(v.detach()) for k, v in losses.items()}

    def save(self) -> None:
        """Write last.pt (whole or not at all) and redraw the loss curve."""
        state = {
            "model": self.model.state_dict(), "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step, "seconds": self.seconds, "losses": self.losses,
        }  # fmt: skip
        with atomic_path(self.directory / CHECKPOINT) as path:
            torch.save(state, path)
        plot_losses(self.directory / "log.csv", self.directory / "loss.png")

    def _load(self) -> None:
        state = _read_checkpoint(self.directory / CHECKPOINT)
        self.model.load_state_dict(state["model"])
        for name, average in self.ema.items():
            average.copy_(state["ema"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.losses = state.get("losses", {})
        drop_rows_after(self.directory / "log.csv", self.step)

    def _make_sheet(self) -> None:
        if self.sheet is None:
            return
        trained = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema)
        self.model.eval()
        self.sheet(self.model, self.directory / f"sheet-{self.step:06d}.png")
        self.model.train()
        self.model.load_state_dict(trained)


@dataclass(frozen=True)
class Stage:
    """What a stage's checkpoint says about it.

    seconds: the time of the steps alone; losses: the means of the last steps, which old checkpoints
    do not hold.
    """

    step: int
    seconds: float
    losses: dict[str, float]


def read_stage(directory: Path) -> Stage | None:
    """What is known about the training in ``directory``; None if it has no checkpoint."""
    path = directory / CHECKPOINT
    if not path.exists():
        return None
    state = _read_checkpoint(path, mmap=True)
    return Stage(state["step"], state["seconds"], state.get("losses", {}))


def _read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    try:
        mmap = check_file(path) and mmap
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (RuntimeError, ValueError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} is damaged: remove it to begin again") from error
