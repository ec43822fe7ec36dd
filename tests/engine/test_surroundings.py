"""Modes of torch that a caller has switched on change no result: not one bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NAMES, tiny_dit, tiny_engine, tiny_vae

from dit_engine import Engine, Generation, load_model
from dit_engine.checkpoint import save_pretrained


@contextlib.contextmanager
def switched(switch: Callable[[Any], None], on: Any, off: Any) -> Iterator[None]:
    switch(on)
    try:
        yield
    finally:
        switch(off)


CONTEXTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: switched(torch.set_default_dtype, torch.float64, torch.float32),
    "meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    # New memory is then filled with NaN.
    "deterministic": lambda: switched(torch.use_deterministic_algorithms, True, False),
}
BACKENDS = [("lean", "fp32"), ("lean", "bf16"), ("lean", "int8"), ("eager", "fp32"),
            ("eager", "fp16")]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_pretrained(path, tiny_dit(), tiny_vae(), NAMES)
    return path


def made(model: Path, backend: str, precision: str, **options: Any) -> Generation:
    engine = Engine.from_pretrained(model, device="cpu")
    return engine.generate([3, 5], seed=0, steps=3, backend=backend, precision=precision, **options)


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[tuple[str, str], torch.Tensor]:
    return {each: made(model, *each, output="pt").images for each in BACKENDS}


@pytest.mark.parametrize("context", CONTEXTS)
def test_generations(
    context: str, model: Path, expected: dict[tuple[str, str], torch.Tensor]
) -> None:
    for backend in BACKENDS:
        states: list[torch.Tensor] = []
        with CONTEXTS[context]():
            result = made(
                model, *backend, output="pt", callback=lambda p: states.append(p.latents)  # noqa: B023
            )  # fmt: skip
        assert result.images.dtype == torch.float32 and result.images.device.type == "cpu"
        assert torch.equal(result.images, expected[backend]), backend
        for tensor in (result.images, *states):
            assert not tensor.is_inference() and not tensor.requires_grad
            tensor.mul_(2)


def test_a_callback_has_the_modes_of_its_caller() -> None:
    """And what it does to the latents changes no image."""
    engine, seen = tiny_engine(), []
    expected = engine.generate([3], seed=0, steps=3, output="latent").images

    def spoil(progress: Any) -> None:
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        progress.latents.zero_()

    options = {"seed": 0, "steps": 3, "output": "latent", "callback": spoil}
    assert torch.equal(engine.generate([3], **options).images, expected)
    with torch.no_grad():
        engine.generate([3], **options)
    assert seen == [(True, False)] * 3 + [(False, False)] * 3
    torch.nn.Conv2d(4, 4, 1)(expected).sum().backward()


@pytest.mark.parametrize("context", CONTEXTS)
def test_models_are_loaded_and_saved(context: str, model: Path, tmp_path: Path) -> None:
    with CONTEXTS[context]():
        loaded = load_model(model)
        save_pretrained(
            tmp_path / "again", loaded, tiny_engine().vae if context == "float64" else None
        )
    for name, tensor in load_model(model).state_dict().items():
        found = loaded.state_dict()[name]
        assert torch.equal(found, tensor) and found.dtype == tensor.dtype
        assert not found.is_inference()
    again = load_model(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in loaded.state_dict().items())
