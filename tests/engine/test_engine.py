"""Engine.generate: randomness, batches, guidance, outputs, threads, memory, bad input."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_dit, tiny_engine
from torch import Tensor

from dit_engine import Engine, __version__
from dit_engine.backends import Backend, Denoiser, create_backend
from dit_engine.backends.lean.backend import LeanDenoiser
from dit_engine.backends.lean.vae import LeanDecoder
from dit_engine.decode import to_uint8
from dit_engine.sampling.noise import OfficialNoise
from dit_engine.sampling.samplers import SAMPLERS
from dit_engine.sampling.schedule import make_schedule
from dit_engine.vae import AutoencoderKL

FAST = {"steps": 4, "output": "latent"}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_depends_on_its_own_label_and_seed_only(engine: Engine, sampler: str) -> None:
    """The same bits alone and in a batch of five, in float32 on the CPU."""
    labels, options = [3, 1, 4, 1, 5], {"steps": 4, "sampler": sampler, "output": "pt"}
    batch = engine.generate(labels, seed=11, **options).images
    for i, label in enumerate(labels):
        assert torch.equal(engine.generate(label, seed=11 + i, **options).images[0], batch[i])


@pytest.mark.parametrize("backend", ["eager", "lean"])
def test_every_part_of_a_split_batch_has_its_own(engine: Engine, backend: str) -> None:
    """The third image is the second part's first: it has its own label, seed, scale and noise."""
    options: dict[str, Any] = FAST | {"backend": backend}
    split, told = tiny_engine(max_batch_size=2), list[tuple[int, int, int]]()
    scales, seeds = [1.0, 2.5, 4.0, 6.0, 1.5], [4, 9, 6, 7, 8]
    options["callback"] = lambda p: told.append((p.first, p.count, p.step))
    made = split.generate(range(5), seeds=seeds, guidance_scale=scales, **options)
    assert told == [(f, c, s) for f, c in ((0, 2), (2, 2), (4, 1)) for s in range(1, 5)]
    for i, (scale, seed) in enumerate(zip(scales, seeds, strict=True)):
        alone = engine.generate([i], seed=seed, guidance_scale=scale, **options)
        assert torch.equal(made.images[i], alone.images[0])
    assert made.settings["guidance_scale"] == scales
    given = {"latents": noise(0, 5, 4, 8, 8), "step_noise": noise(1, 4, 5, 4, 8, 8)}
    whole, parts = (e.generate(range(5), **given, **options).images for e in (engine, split))
    assert torch.equal(whole, parts)


def test_seed_counts_up_and_random_seeds_are_recorded(engine: Engine) -> None:
    by_seed = engine.generate([1, 2], seed=7, **FAST)
    assert by_seed.seeds == [7, 8]
    assert torch.equal(by_seed.images, engine.generate([1, 2], seeds=range(7, 9), **FAST).images)
    drawn = engine.generate([1, 2], **FAST)
    again = engine.generate([1, 2], seeds=drawn.seeds, **FAST)
    assert torch.equal(drawn.images, again.images)
    assert drawn.seeds != engine.generate([1, 2], **FAST).seeds
    last = 2**63 - 1
    assert engine.generate([1, 2], steps=1, seed=last - 1).seeds == [last - 1, last]
    z = noise(7, 1, 4, 8, 8)  # given latents leave the draws of the steps as they are
    assert torch.equal(engine.generate([1], seed=7, latents=z, **FAST).images, by_seed.images[:1])


@pytest.mark.parametrize(("scale", "rows"), [(4.0, 6), (1.0, 3)])
def test_official_noise_draws_as_the_reference(engine: Engine, scale: float, rows: int) -> None:
    """From one generator: z for N, then 2N per step, or N without guidance."""
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(3, 4, 8, 8, generator=generator)
    draws = torch.stack([torch.randn(rows, 4, 8, 8, generator=generator)[:3] for _ in range(4)])
    options = FAST | {"guidance_scale": scale}
    given = engine.generate([1, 2, 3], latents=z, step_noise=draws, **options).images
    official = engine.generate([1, 2, 3], seed=5, noise="official", **options).images
    assert torch.equal(given, official)
    source = OfficialNoise(5, 3, scale != 1, (4, 8, 8), engine.device)
    assert torch.equal(source.start(), z)
    assert torch.equal(source(2), draws[2])  # the draws of steps 0 and 1 were not used


def test_no_guidance_at_all_is_the_null_class(engine: Engine) -> None:
    """Scale 0 of all channels; ddim does not use the variance, which is the label's own."""
    options = FAST | {"seed": 5, "sampler": "ddim", "guidance_channels": None}
    schedule, null = make_schedule(4), torch.tensor([10])

    def denoise(z: Tensor, k: int) -> Tensor:
        return engine.model(z, torch.tensor([schedule.timesteps[k]]), null)

    with torch.inference_mode():
        expected = SAMPLERS["ddim"].function(
            denoise, noise(5, 1, 4, 8, 8), schedule, lambda k: torch.empty(0)
        )
    for backend in ("eager", "lean"):
        made = engine.generate([3], guidance_scale=0.0, backend=backend, **options).images
        assert torch.allclose(made, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_no_unconditional_half_where_guidance_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the lean model at each step: N without guidance, 2N with."""
    engine, rows = tiny_engine(), list[int]()
    forward = LeanDenoiser.forward

    def counted(self: LeanDenoiser, x: Tensor, step: int, count: int) -> Tensor:
        rows.append(count)
        return forward(self, x, step, count)

    monkeypatch.setattr(LeanDenoiser, "forward", counted)
    # The four official steps 999, 666, 333 and 0 have noise levels 157, 9.6, 1.5 and 0.01.
    bar = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))[[999, 666, 333, 0]]
    levels = np.sqrt((1 - bar) / bar)
    interval = (0.999 * levels[2], 1.001 * levels[1])
    engine.generate([1, 2], seed=0, guidance_interval=interval, **FAST)
    engine.generate([1, 2], seed=0, guidance_scale=1.0, **FAST)
    assert rows == [2, 4, 4, 2] + [2] * 4


def test_pixels_are_those_of_the_reference() -> None:
    """127.5·x + 128, clamped and truncated, as its sample_ddp.py."""
    decoded = torch.linspace(-1.2, 1.2, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    expected = np.clip(127.5 * decoded.numpy() + np.float32(128), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(to_uint8(decoded), expected.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_outputs_and_what_the_vae_decodes_in(engine: Engine, precision: str) -> None:
    """float32 for fp16 too; bfloat16 is a hundred times as far from it."""
    options = {"seed": 1, "steps": 2, "precision": precision}
    pil, array, pixels, latents = (
        engine.generate([1, 2], output=output, **options).images
        for output in ("pil", "np", "pt", "latent")
    )
    assert engine.vae is not None
    with torch.no_grad():
        vae = copy.deepcopy(engine.vae).double()
        exact = vae.decode(latents.double() / vae.config.scaling_factor)
    error = (pixels - (exact.clamp(-1, 1) + 1) / 2).abs().max()
    assert (error > 1e-4) if precision == "bf16" else (error < 1e-5)
    assert array.dtype == np.uint8 and array.shape == (2, 16, 16, 3)
    assert np.array_equal(np.stack([np.asarray(image) for image in pil]), array)
    assert np.abs(pixels.permute(0, 2, 3, 1).numpy() * 255 - array).max() <= 1.0


@pytest.mark.slow
def test_compile_equals_eager_in_autocast_too() -> None:
    engine = Engine(tiny_dit(depth=1), device="cpu")
    options = {"seed": 0, "steps": 2, "guidance_scale": 1.0}
    eager = engine.generate([1], backend="eager", **options).images
    with torch.autocast("cpu", torch.bfloat16):
        compiled = engine.generate([1], backend="compile", **options).images
    assert ((compiled - eager).norm() / eager.norm()).item() < 1e-4


def test_four_threads_share_a_fresh_engine(engine: Engine) -> None:
    options = {"steps": 4, "output": "np"}
    expected = [engine.generate([i] * 2, seed=i, **options).images for i in range(4)]
    shared = tiny_engine()  # its backend and decoder are made while four threads ask for them

    def work(i: int) -> list[np.ndarray]:
        return [shared.generate([i] * 2, seed=i, **options).images for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        for i, results in enumerate(pool.map(work, range(4))):
            assert all(np.array_equal(images, expected[i]) for images in results)


def test_threads_hold_while_generating_and_only_in_its_thread() -> None:
    engine, before = tiny_engine(threads=1), torch.get_num_threads()
    torch.set_num_threads(2)
    seen: list[tuple[int, int]] = []

    def callback(_: object) -> None:
        with ThreadPoolExecutor(1) as fresh:  # it has not used torch yet
            seen.append((torch.get_num_threads(), fresh.submit(torch.get_num_threads).result()))

    try:
        engine.generate(1, seed=0, callback=callback, **FAST)
        callback(None)
        assert seen == [(1, 2)] * 4 + [(2, 2)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_a_generation_records(engine: Engine) -> None:
    z, draws = torch.zeros(1, 4, 8, 8), torch.ones(4, 1, 4, 8, 8)
    plain = engine.generate(1, seed=3, **FAST)
    assert plain.seeds == [3] and "images" not in repr(plain)
    assert plain.settings == {
        "model": "memory", "numerics": "official", "version": __version__, "sampler": "ddpm",
        "steps": 4, "spacing": "official", "eta": 0.0, "guidance_scale": 4.0,
        "guidance_channels": 3, "guidance_interval": None, "noise": "per-image",
        "precision": "fp32", "backend": "lean",
    }  # fmt: skip
    given = engine.generate(1, seed=3, latents=z, step_noise=draws, **FAST)
    assert given.seeds is None  # no random number was drawn
    assert given.settings["latents_sha256"] == hashlib.sha256(bytes(4 * z.numel())).hexdigest()
    assert "step_noise_sha256" in given.settings
    assert engine.generate(1, seed=3, latents=z, **FAST).seeds == [3]  # for ddpm's steps
    assert engine.generate(1, latents=z, sampler="ddim", **FAST).seeds is None


class Limited(Backend):
    """A backend that runs out of memory above ``rows`` rows."""

    def __init__(self, inner: Backend, rows: int) -> None:
        self.inner, self.rows = inner, rows

    def prepare(self, labels: Tensor, timesteps: Tensor) -> Denoiser:
        if len(labels) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner.prepare(labels, timesteps)


def test_out_of_memory_halves_the_batch_and_says_so(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.generate(range(6), seed=0, backend="eager", **FAST).images
    limited = Limited(create_backend("eager", engine.model, "fp32", engine.device), rows=6)
    monkeypatch.setattr(engine, "_backend", lambda *_: limited)
    with pytest.warns(UserWarning, match="out of memory with a batch of 6: going on with 3"):
        images = engine.generate(range(6), seed=0, **FAST).images
    assert torch.equal(images, expected)
    limited.rows = 1
    with pytest.raises(MemoryError, match="a batch of 1"):
        engine.generate([1], seed=0, **FAST)
    with pytest.raises(MemoryError, match="a batch of 2"):  # its draws belong to the whole batch
        engine.generate([1, 2], seed=0, noise="official", **FAST)


@pytest.mark.parametrize("backend", ["eager", "lean"])
def test_out_of_memory_in_the_vae(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, then image by image, then in tiles of half the side (bf16: fp32 is never whole)."""
    engine, largest = tiny_engine(), [0]
    options = {"steps": 1, "seed": 1, "output": "pt", "precision": "bf16", "backend": backend}
    expected = engine.generate([1, 2], **options).images

    def limited(decode: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def refuse(decoder: object, z: Tensor) -> Tensor:
            if z.numel() > largest[0]:
                raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")
            return decode(decoder, z)

        return refuse

    monkeypatch.setattr(AutoencoderKL, "decode", limited(AutoencoderKL.decode))
    monkeypatch.setattr(LeanDecoder, "__call__", limited(LeanDecoder.__call__))
    for largest[0], said in ((4 * 8 * 8, "image by image"), (4 * 4 * 4, "in tiles")):
        with pytest.warns(UserWarning, match=f"decoding {said}"):
            images = engine.generate([1, 2], **options).images
        assert images.shape == expected.shape
        if said == "image by image":
            assert torch.allclose(images, expected, atol=0.02)  # bfloat16 in another order of sums
    largest[0] = 0
    with pytest.warns(UserWarning, match="tiles"), pytest.raises(MemoryError, match="tiles of 4"):
        engine.generate([1, 2], **options)
