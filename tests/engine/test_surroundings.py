"""Modes of torch that a caller has switched on change no result: not one bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NAMES, tiny_dit, tiny_engine, tiny_vae

import dit_kernels
from dit_engine import Engine, Generation, load_model
from dit_engine.checkpoint import save_pretrained
from dit_engine.integrations.diffusers import accelerate


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # new memory is then filled with NaN
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CONTEXTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast fp16": lambda: torch.autocast("cpu", torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "default meta": lambda: default_device("meta"),
    "with meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "deterministic": deterministic,
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


OPERATORS: dict[str, Callable[[dict[str, torch.Tensor], str], Any]] = {
    "layernorm_modulate": lambda t, impl: dit_kernels.layernorm_modulate(
        t["x"], t["v"], t["v"], impl=impl
    ),
    "gate_residual": lambda t, impl: dit_kernels.gate_residual(t["x"], t["x"], t["v"], impl=impl),
    "gate_residual_layernorm_modulate": lambda t, impl: (
        dit_kernels.gate_residual_layernorm_modulate(
            t["x"], t["x"], t["v"], t["v"], t["v"], impl=impl
        )
    ),
    "attention": lambda t, impl: dit_kernels.attention(t["qkv"], 2, impl=impl),
    "groupnorm_silu": lambda t, impl: dit_kernels.groupnorm_silu(
        t["c"], 4, t["w"], t["w"], impl=impl
    ),
    "quantize_rows": lambda t, impl: dit_kernels.quantize_rows(t["x"], torch.int8, impl=impl),
    "layernorm_modulate_quantize": lambda t, impl: dit_kernels.layernorm_modulate_quantize(
        t["x"], t["v"], t["v"], dtype=torch.int8, impl=impl
    ),
    "linear": lambda t, impl: dit_kernels.linear(t["x"], t["m"], t["b"], impl=impl),
    "linear_gelu": lambda t, impl: dit_kernels.linear_gelu(t["x"], t["m"], t["b"], impl=impl),
    "PackedLinear": lambda t, _: dit_kernels.PackedLinear(t["m"], t["b"])(t["x"]),
    "QuantizedLinear": lambda t, _: dit_kernels.QuantizedLinear(
        t["m"], t["b"], "int8", torch.bfloat16
    )(*dit_kernels.quantize_rows(t["x"], torch.int8)),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_operators(context: str, impl: str) -> None:
    shapes = {"x": (2, 16, 64), "v": (2, 64), "qkv": (2, 16, 192), "c": (2, 8, 6, 6), "w": (8,),
              "m": (48, 64), "b": (48,)}  # fmt: skip
    g = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    tensors["c"] = tensors["c"].contiguous(memory_format=torch.channels_last)
    for name, run in OPERATORS.items():
        outside = run(tensors, impl)
        with CONTEXTS[context]():
            inside = run(tensors, impl)
        pairs = (
            zip(inside, outside, strict=True) if isinstance(inside, tuple) else [(inside, outside)]
        )
        for a, b in pairs:
            assert a.dtype == b.dtype and torch.equal(a, b), name


def test_an_accelerated_pipeline() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=1,
        sample_size=8, num_embeds_ada_norm=10,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(latent_channels=4)
    scheduler = diffusers.DDIMScheduler()

    def accelerated(context: Callable[[], Any]) -> torch.Tensor:
        with context():
            pipe = accelerate(diffusers.DiTPipeline(transformer, vae, scheduler))
        x, t, y = torch.ones(1, 4, 8, 8), torch.tensor([7]), torch.tensor([3])
        with torch.no_grad():
            return pipe.transformer(x, timestep=t, class_labels=y).sample

    outside = accelerated(contextlib.nullcontext)
    for name, context in CONTEXTS.items():
        assert torch.equal(accelerated(context), outside), name
