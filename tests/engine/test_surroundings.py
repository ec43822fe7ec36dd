"""Modes of torch that a caller has switched on change no result: not one bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import pipeline
from tiny import NAMES, tiny_dit, tiny_engine, tiny_vae

import dit_kernels
from dit_engine import Engine, Generation, load_model
from dit_engine.checkpoint import save_pretrained
from dit_engine.integrations.diffusers import accelerate


@contextlib.contextmanager
def switched(switch: Callable[[Any], None], on: Any, off: Any) -> Iterator[None]:
    switch(on)
    try:
        yield
    finally:
        switch(off)


CONTEXTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast fp16": lambda: torch.autocast("cpu", torch.float16),
    "float64": lambda: switched(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: switched(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default meta": lambda: switched(torch.set_default_device, "meta", None),
    "with meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    # New memory is then filled with NaN.
    "deterministic": lambda: switched(torch.use_deterministic_algorithms, True, False),
}
BACKENDS = [("lean", "fp32"), ("lean", "bf16"), ("lean", "fp16"), ("lean", "int8"),
            ("eager", "fp32"), ("eager", "bf16"), ("eager", "fp16")]  # fmt: skip


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "context"),
    [("compile", "autocast"), ("onnxruntime", "float64"), ("onnxruntime", "with meta")],
)
def test_generations_of_what_is_compiled(
    backend: str, context: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled and exported within the context, too."""
    monkeypatch.setenv("DIT_ENGINE_CACHE", str(tmp_path / "a"))
    outside = made(model, backend, "fp32", output="pt").images
    monkeypatch.setenv("DIT_ENGINE_CACHE", str(tmp_path / "b"))
    with CONTEXTS[context]():
        inside = made(model, backend, "fp32", output="pt").images
    assert torch.equal(inside, outside)


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
            tmp_path / "again", loaded, tiny_engine().vae if context == "no_grad" else None
        )
    for name, tensor in load_model(model).state_dict().items():
        found = loaded.state_dict()[name]
        assert torch.equal(found, tensor) and found.dtype == tensor.dtype
        assert not found.is_inference()
    again = load_model(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in loaded.state_dict().items())


def operators(t: dict[str, torch.Tensor], impl: Any) -> dict[str, Any]:
    """What each operator gives for these tensors."""
    k, x, v = dit_kernels, t["x"], t["v"]
    quantized = k.QuantizedLinear(t["m"], t["b"], "int8", torch.bfloat16)
    return {
        "layernorm_modulate": k.layernorm_modulate(x, v, v, impl=impl),
        "gate_residual": k.gate_residual(x, x, v, impl=impl),
        "both": k.gate_residual_layernorm_modulate(x, x, v, v, v, impl=impl),
        "attention": k.attention(t["qkv"], 2, impl=impl),
        "groupnorm_silu": k.groupnorm_silu(t["c"], 4, t["w"], t["w"], impl=impl),
        "quantize_rows": k.quantize_rows(x, torch.int8, impl=impl),
        "quantize": k.layernorm_modulate_quantize(x, v, v, dtype=torch.int8, impl=impl),
        "linear": k.linear(x, t["m"], t["b"], impl=impl),
        "linear_gelu": k.linear_gelu(x, t["m"], t["b"], impl=impl),
        "PackedLinear": k.PackedLinear(t["m"], t["b"])(x),
        "QuantizedLinear": quantized(*k.quantize_rows(x, torch.int8)),
    }


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_operators(impl: str) -> None:
    shapes = {"x": (2, 16, 64), "v": (2, 64), "qkv": (2, 16, 192), "c": (2, 8, 6, 6), "w": (8,),
              "m": (48, 64), "b": (48,)}  # fmt: skip
    g = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    tensors["c"] = tensors["c"].contiguous(memory_format=torch.channels_last)
    outside = operators(tensors, impl)
    for context in CONTEXTS.values():
        with context():
            inside = operators(tensors, impl)
        torch.testing.assert_close(inside, outside, rtol=0, atol=0)


def test_an_accelerated_pipeline() -> None:
    original = pipeline(num_layers=1, num_embeds_ada_norm=10)

    def accelerated(context: Callable[[], Any]) -> torch.Tensor:
        with context():
            pipe = accelerate(type(original)(**original.components))
        x, t, y = torch.ones(1, 4, 8, 8), torch.tensor([7]), torch.tensor([3])
        with torch.no_grad():
            return pipe.transformer(x, timestep=t, class_labels=y).sample

    outside = accelerated(contextlib.nullcontext)
    for name, context in CONTEXTS.items():
        assert torch.equal(accelerated(context), outside), name
