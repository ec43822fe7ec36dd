"""The lean backend and decoder on a GPU: captured steps against the eager model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import assert_close_to_reference, exact_float32, relative_error
from tiny import tiny_dit, tiny_vae
from torch import Tensor

from dit_engine.backends.capture import GRAPH_LIMIT
from dit_engine.backends.lean.choice_file import remembered
from dit_engine.backends.lean.vae import LeanDecoder
from dit_engine.engine import Engine
from dit_engine.sampling.coefficients import step_coefficients
from dit_engine.sampling.samplers import SAMPLERS
from dit_engine.sampling.schedule import make_schedule
from dit_engine.vae import AutoencoderKL, VAEConfig
from dit_kernels.quantized import quantized_why_not

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NARROW = VAEConfig(block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=8)
SCALES = [1.0, 4.0, 2.0]


@pytest.fixture(autouse=True)
def _no_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns measuring off, which would compile every candidate and take longer than these tests."""
    monkeypatch.setenv("DIT_KERNELS_CHOOSE", "0")


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    with exact_float32():
        yield


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Head dimension 72, as XL's, in two blocks."""
    yield Engine(tiny_dit(hidden_size=144), tiny_vae(), device=DEVICE, max_batch_size=16)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def latents(engine: Engine, backend: str, n: int = 3, **options: Any) -> Tensor:
    common: dict[str, Any] = {
        "steps": 5, "seed": 4, "guidance_scale": SCALES[:n], "output": "latent",
    }  # fmt: skip
    return engine.generate(list(range(n)), backend=backend, **common | options).images


@pytest.mark.parametrize(
    "options",
    [
        *({"sampler": sampler} for sampler in SAMPLERS),
        {"guidance_scale": 1.0},
        {"guidance_interval": (0.5, 10.0)},
        {"guidance_channels": None},
        {"noise": "official"},
    ],
    ids=str,
)
def test_generate_equals_eager(engine: Engine, options: dict[str, Any]) -> None:
    lean, eager = (latents(engine, b, **options) for b in ("lean", "eager"))
    assert relative_error(lean, eager) < 1e-4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_as_near_to_float32_as_eager(engine: Engine, precision: str) -> None:
    exact = latents(engine, "eager", sampler="ddim")
    found = {b: latents(engine, b, sampler="ddim", precision=precision) for b in ("lean", "eager")}
    # Five steps add rounding to rounding, in an order of each one's own.
    assert relative_error(found["lean"], exact) < 3 * relative_error(found["eager"], exact)


def test_the_choice_is_right_and_stored(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIT_KERNELS_CHOOSE", "1")
    monkeypatch.setenv("DIT_ENGINE_CACHE", str(tmp_path))
    options: dict[str, Any] = {"sampler": "ddim", "precision": "bf16"}
    exact, eager = latents(engine, "eager", sampler="ddim"), latents(engine, "eager", **options)
    first = latents(Engine(engine.model, device=DEVICE), "lean", **options)
    assert relative_error(first, exact) < 3 * relative_error(eager, exact)
    (known,) = remembered().values()
    products = (
        {"qkv", "proj", "fc1", "fc2"} if torch.cuda.get_device_capability()[0] == 9 else set()
    )
    assert {key.split()[0] for key in known} == {"attention", *products}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = latents(Engine(engine.model, device=DEVICE), "lean", **options)
    assert torch.equal(again, first) and [*remembered().values()] == [known]


def test_the_next_step_is_one_launch(engine: Engine) -> None:
    lean = engine._backend("lean", "fp32")
    labels, timesteps = torch.tensor([1, 10]), torch.linspace(999, 0, 6).round().long()
    with torch.inference_mode():
        coefficients = step_coefficients("ddim", make_schedule(6), learned=True)
        fused = lean.fuse(labels.cuda(), timesteps.cuda(), coefficients, torch.tensor([4.0]), 3)
        assert fused is not None
        z, x0 = torch.randn(2, 1, *engine.config.latent_shape, device=DEVICE)
        for step in range(2):
            z, x0 = fused.guided_step(z, x0, None, step, True)
        with torch.profiler.profile() as seen:
            for step in range(2, 6):
                z, x0 = fused.guided_step(z, x0, None, step, True)
            torch.cuda.synchronize()
        fused.release()
    calls = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")
    launched = [event.name for event in seen.events() or () if event.name.startswith(calls)]
    assert launched == ["cudaGraphLaunch"] * 4


def test_more_batch_sizes_than_graphs_are_kept(engine: Engine) -> None:
    sizes = [*range(1, GRAPH_LIMIT + 3), 1]  # the first is dropped meanwhile, and made again
    options: dict[str, Any] = {"guidance_scale": 3.0, "steps": 2}
    first = {n: latents(engine, "lean", n, **options) for n in sizes}
    for n in sizes:
        assert relative_error(first[n], latents(engine, "eager", n, **options)) < 1e-4


def test_threads_on_streams_of_their_own(engine: Engine) -> None:
    """Captures among replays, and replays of one graph, of several threads at once."""
    expected = [latents(engine, "eager", 1 + i % 3, seed=i) for i in range(6)]
    fresh = Engine(engine.model, device=DEVICE)  # nothing captured yet

    def work(i: int) -> list[Tensor]:
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
            return [latents(fresh, "lean", 1 + i % 3, seed=i) for _ in range(6)]

    with ThreadPoolExecutor(6) as pool:
        for i, found in enumerate(pool.map(work, range(6))):
            for result in found:
                assert relative_error(result, expected[i]) < 1e-4


def test_fp8(engine: Engine) -> None:
    if (reason := quantized_why_not("fp8", DEVICE)) is not None:
        pytest.skip(reason)
    exact = latents(engine, "eager", sampler="ddim")
    error = relative_error(latents(engine, "lean", sampler="ddim", precision="fp8"), exact)
    # Three bits of mantissa; a wrong scale would give an error near 1.
    assert 1e-4 < error < 0.25


@pytest.mark.parametrize(("config", "n"), [(VAEConfig(), 1), (tiny_vae().config, 3), (NARROW, 3)])
def test_vae_decode(config: VAEConfig, n: int) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(config).eval().to(DEVICE)
    z = torch.randn(n, config.latent_channels, 9, 7, device=DEVICE)
    with torch.inference_mode():
        exact = copy.deepcopy(vae).double().decode(z.double())
        decoder = LeanDecoder(vae, torch.float32, DEVICE)
        for _ in range(3):  # as it is, captured, and replayed
            assert_close_to_reference(decoder(z), exact, tolerance=1e-5)
        assert not torch.backends.cudnn.benchmark
        half = copy.deepcopy(vae).bfloat16().decode(z.bfloat16())
        lean = LeanDecoder(vae, torch.bfloat16, DEVICE)(z)
        assert_close_to_reference(lean, exact, same_dtype=half.float())
