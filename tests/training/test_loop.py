"""The training loop: it learns, resumes exactly, and averages its weights."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dit_engine.training.log import add_row, drop_rows_after
from dit_engine.training.loop import CHECKPOINT, Budget, LoopSettings, Trainer, read_stage
from dit_engine.training.stopping import Stopped, signals_noted


def trainer(
    directory: Path, steps: int, watch: Callable[[Trainer], None] = lambda _: None,
    seen: list | None = None, **options: object,
) -> Trainer:  # fmt: skip
    """A regression. watch is called before each step's loss, which is put into seen."""
    torch.manual_seed(0)
    options = {"warmup_steps": 5, "ema_decay": 0.9} | options

    def loss(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        watch(run)
        x = torch.randn(16, 3, generator=generator)
        found = (model(x) - x @ torch.tensor([[1.0], [-2.0], [3.0]])).square().mean()
        if seen is not None:
            seen.append(float(found.detach()))
        return {"loss": found}

    settings = LoopSettings(Budget(steps=steps), 0.1, **options)
    run = Trainer(nn.Linear(3, 1), loss, settings, directory)
    return run


def rows_of(directory: Path) -> list[list[str]]:
    return [row.split(",") for row in (directory / "log.csv").read_text().splitlines()]


def test_it_learns_a_linear_map_and_keeps_the_last_losses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[float] = []
    assert read_stage(tmp_path) is None
    model = trainer(tmp_path, 320, seen=seen, warmup_steps=80).run("test")
    assert torch.allclose(model.weight, torch.tensor([[1.0, -2.0, 3.0]]), atol=1e-2)
    rows = rows_of(tmp_path)
    assert rows[0] == ["step", "seconds", "lr", "loss"] and len(rows) == 1 + 320 // 50
    assert float(rows[-1][3]) < 1e-2 < float(rows[1][3])
    # The rate of the step before the row's, counted from 0: warm-up times what is left.
    assert float(rows[1][2]) == pytest.approx(0.1 * 50 / 80 * (1 - 49 / 320), rel=1e-4)
    assert float(rows[6][2]) == pytest.approx(0.1 * (1 - 299 / 320), rel=1e-4)
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    stage = read_stage(tmp_path)
    assert stage is not None and stage.step == 320 and stage.seconds > 0
    assert stage.losses == {"loss": pytest.approx(sum(seen[-50:]) / 50)}
    assert trainer(tmp_path, 320).losses == stage.losses
    assert "test: step 320 of 320, loss" in capsys.readouterr().err


def test_the_ema_is_the_weighted_mean_of_the_weights(tmp_path: Path) -> None:
    weights: list[Tensor] = []
    run = trainer(tmp_path, 40, lambda run: weights.append(run.model.weight.detach().clone()))
    expected = run.model.weight.detach().clone()
    run.run("test")
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)  # which runs no code
    assert state["step"] == 40 and set(state["ema"]) == {"weight", "bias"}
    for step, weight in enumerate([*weights[1:], state["model"]["weight"]], start=1):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    assert torch.allclose(run.model.weight, expected, atol=1e-6)


def test_a_killed_run_resumes_as_if_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_at_70(run: Trainer) -> None:
        if run.step == 70:
            raise SystemError

    whole = trainer(tmp_path / "whole", 120).run("whole")
    # The curve is drawn at every checkpoint; here there is one after every step.
    monkeypatch.setattr("dit_engine.training.loop.plot_losses", lambda *_: None)
    with pytest.raises(SystemError):
        trainer(tmp_path / "killed", 120, fail_at_70, save_seconds=0.0).run("killed")
    resumed = trainer(tmp_path / "killed", 120)
    assert resumed.step == 70
    model = resumed.run("resumed")
    assert torch.equal(model.weight, whole.weight) and torch.equal(model.bias, whole.bias)
    assert [row[0] for row in rows_of(tmp_path / "killed")] == ["step", "50", "100"]


def test_a_checkpoint_that_breaks_off_leaves_the_one_before_and_a_damaged_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, 5)
    run.run("test")

    def half(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    run.step = 9
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError, match="disk full"):
            run.save()
    assert trainer(tmp_path, 5).step == 5
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"last\.pt is damaged: remove it"):
        trainer(tmp_path, 20)


def test_every_step_draws_anew_by_seed_and_step(tmp_path: Path) -> None:
    def draws(name: str, seed: int) -> list[float]:
        drawn: list[float] = []

        def loss(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
            drawn.append(float(torch.rand((), generator=generator, dtype=torch.float64)))
            return {"loss": model.weight.sum()}

        settings = LoopSettings(Budget(steps=12), 0.1, seed=seed)
        Trainer(nn.Linear(3, 1), loss, settings, tmp_path / name).run("test")
        return drawn

    first, same, other = draws("a", 1), draws("b", 1), draws("c", 2)
    assert first == same
    assert len(set(first + other)) == 24  # none twice, over steps and over seeds


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_a_later_run_goes_on(
    tmp_path: Path, sent: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    def signal_at_17(run: Trainer) -> None:
        if run.step == 17:
            signal.raise_signal(sent)

    whole = trainer(tmp_path / "whole", 40).run("whole")
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Stopped, match="test: stopped after 18 steps, saved") as caught:
        trainer(tmp_path / "stopped", 40, signal_at_17).run("test")
    assert caught.value.exit_code == 128 + sent and isinstance(caught.value, KeyboardInterrupt)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert "test: stopping after this step (Ctrl-C again: at once)" in capfd.readouterr().err
    resumed = trainer(tmp_path / "stopped", 40)
    assert resumed.step == 18
    assert torch.equal(resumed.run("resumed").weight, whole.weight)


def test_a_second_signal_would_end_the_program_and_ignored_ones_stay_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with signals_noted("once") as noted:
            assert noted() == 0 and signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
            assert noted() == signal.SIGINT
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    with ThreadPoolExecutor(1) as pool:  # where no handler can be set
        assert pool.submit(lambda: signals_noted("x").__enter__()()).result() == 0


def test_budgets_and_an_empty_log(tmp_path: Path) -> None:
    assert Budget(steps=100).progress(25, 0.0) == 0.25
    assert Budget(minutes=2.0).progress(5, 60.0) == 0.5
    assert Budget(minutes=2.0).progress(5, 600.0) == 1.0
    for values in ({}, {"steps": 1, "minutes": 1.0}, {"steps": 0}, {"minutes": float("nan")}):
        with pytest.raises(ValueError, match=r"give exactly one|is not above 0"):
            Budget(**values)
    log = tmp_path / "log.csv"
    log.touch()  # as a full disk leaves it
    drop_rows_after(log, 3)
    add_row(log, {"step": 1, "loss": 0.5})
    assert log.read_text().split() == ["step,loss", "1,0.5"]
