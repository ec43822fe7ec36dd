"""Engine.generate: randomness, batches, guidance, outputs, threads, memory, bad input."""

from __future__ import annotations

import copy
import hashlib
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_engine

from dit_engine import Engine, Generation, Progress, __version__
from dit_engine.backends import Backend, Denoiser, create_backend
from dit_engine.backends.lean.backend import LeanDenoiser
from dit_engine.backends.lean.vae import LeanDecoder
from dit_engine.decode import LatentDecoder
from dit_engine.sampling.noise import OfficialNoise
from dit_engine.sampling.samplers import SAMPLERS
from dit_engine.sampling.schedule import make_schedule
from dit_engine.vae import AutoencoderKL

FAST = {"steps": 4, "output": "latent"}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


@pytest.mark.parametrize("output", ["latent", "pt"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_depends_on_its_own_label_and_seed_only(
    engine: Engine, sampler: str, output: str
) -> None:
    """Alone, in a batch of five, in another order: the same bits, float32 on the CPU."""
    labels, seeds = [3, 1, 4, 1, 5], [11, 12, 13, 14, 15]
    options = {"steps": 4, "sampler": sampler, "output": output}
    batch = engine.generate(labels, seeds=seeds, **options).images
    order = [4, 2, 0, 1, 3]
    shuffled = engine.generate(
        [labels[i] for i in order], seeds=[seeds[i] for i in order], **options
    ).images
    for place, i in enumerate(order):
        assert torch.equal(shuffled[place], batch[i])
    for i, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
        alone = engine.generate(label, seed=seed, **options).images[0]
        assert torch.equal(alone, batch[i]), (alone - batch[i]).abs().max()


def test_seed_counts_up_and_random_seeds_are_recorded(engine: Engine) -> None:
    by_seed = engine.generate([1, 2], seed=7, **FAST)
    assert by_seed.seeds == [7, 8]
    assert torch.equal(by_seed.images, engine.generate([1, 2], seeds=[7, 8], **FAST).images)
    for seeds in (torch.tensor([7, 8]), np.array([7, 8]), range(7, 9)):
        assert engine.generate([1, 2], seeds=seeds, **FAST).seeds == [7, 8]
    assert engine.generate(1, seed=torch.tensor(7), **FAST).seeds == [7]
    drawn = engine.generate([1, 2], **FAST)
    again = engine.generate([1, 2], seeds=drawn.seeds, **FAST)
    assert torch.equal(drawn.images, again.images)
    assert drawn.seeds != engine.generate([1, 2], **FAST).seeds


@pytest.mark.parametrize("output", ["np", "pil"])
def test_pixels_leave_the_device_as_bytes(
    engine: Engine, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is copied to the host is uint8 already; 127.5·x + 128, clamped and truncated."""
    copied: list[torch.dtype] = []
    decoded = torch.linspace(-1.2, 1.2, 2 * 3 * 16 * 16).view(2, 3, 16, 16)

    class OnDevice(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func in (torch.Tensor.cpu, torch.Tensor.to):
                result = super().__torch_function__(func, types, args, kwargs or {})
                host = func is torch.Tensor.cpu or any(str(a) == "cpu" for a in args[1:])
                copied.extend([args[0].dtype] * host)
                return result
            return super().__torch_function__(func, types, args, kwargs or {})

    monkeypatch.setattr(
        LatentDecoder, "__call__", lambda self, z, *_: decoded.as_subclass(OnDevice)
    )
    images = engine.generate([1, 2], seed=0, steps=1, output=output).images
    expected = np.clip(127.5 * decoded.numpy() + np.float32(128), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(np.stack(images), expected.transpose(0, 2, 3, 1))
    assert copied == [torch.uint8]


def test_batches_larger_than_the_limit_are_split(engine: Engine) -> None:
    small = tiny_engine(max_batch_size=2)
    seen = []
    result = small.generate(
        range(5), seed=3, callback=lambda p: seen.append((p.first, p.count, p.step)), **FAST
    )
    assert torch.equal(result.images, engine.generate(range(5), seed=3, **FAST).images)
    assert seen == [(f, c, s) for f, c in ((0, 2), (2, 2), (4, 1)) for s in range(1, 5)]


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
    assert not torch.equal(official, engine.generate([1, 2, 3], seed=5, **options).images)
    noise = OfficialNoise(5, 3, scale != 1, (4, 8, 8), engine.device)
    assert torch.equal(noise.start(), z)
    assert torch.equal(noise(2), draws[2])  # the draws of steps 0 and 1 were not used


def test_given_latents_leave_the_draws_of_the_steps_as_they_are(engine: Engine) -> None:
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    given = engine.generate([1], seed=5, latents=z, **FAST).images
    assert torch.equal(given, engine.generate([1], seed=5, **FAST).images)


def test_no_guidance_at_all_is_the_null_class(engine: Engine) -> None:
    """Scale 0 of all channels; ddim does not use the variance, which is the label's own."""
    options = FAST | {"seed": 5, "sampler": "ddim", "guidance_channels": None}
    schedule, null = make_schedule(4), torch.tensor([10])
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))

    def denoise(z: torch.Tensor, k: int) -> torch.Tensor:
        return engine.model(z, torch.tensor([schedule.timesteps[k]]), null)

    with torch.inference_mode():
        expected = SAMPLERS["ddim"].function(denoise, z, schedule, lambda k: z)
    for backend in ("eager", "lean"):
        made = engine.generate([3], guidance_scale=0.0, backend=backend, **options).images
        assert torch.allclose(made, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("backend", ["eager", "lean"])
def test_no_unconditional_half_where_guidance_is_off(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that the model really sees at each step: N without guidance, 2N with."""
    engine, rows = tiny_engine(), [0]
    engine.model.register_forward_pre_hook(lambda _, args: rows.append(rows.pop() + len(args[0])))
    forward = LeanDenoiser.forward

    def counted(self: LeanDenoiser, x: torch.Tensor, step: int, count: int) -> torch.Tensor:
        output = forward(self, x, step, count)
        rows.append(rows.pop() + len(output))
        return output

    monkeypatch.setattr(LeanDenoiser, "forward", counted)

    def rows_by_step(**options: object) -> list[int]:
        rows[:] = [0]
        engine.generate([1, 2], seed=0, backend=backend, callback=lambda _: rows.append(0),
                        **options, **FAST)  # fmt: skip
        return rows[:-1]

    assert rows_by_step(guidance_scale=1.0) == [2] * 4
    assert rows_by_step() == [4] * 4
    # The four official steps 999, 666, 333 and 0 have noise levels 157, 9.6, 1.5 and 0.01.
    bar = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))[[999, 666, 333, 0]]
    levels = np.sqrt((1 - bar) / bar)
    just_above_second, just_below_third = 1.001 * levels[1], 0.999 * levels[2]
    assert rows_by_step(guidance_interval=(just_below_third, just_above_second)) == [2, 4, 4, 2]
    assert rows_by_step(guidance_interval=(1.001 * levels[2], 200.0)) == [4, 4, 2, 2]


def test_guidance_scales_of_every_part_of_a_split_batch(engine: Engine) -> None:
    """The third image is the second part's first: it has its own scale, not the call's first."""
    scales, seeds = [1.0, 2.5, 4.0, 6.0, 1.5], [4, 5, 6, 7, 8]
    split = tiny_engine(max_batch_size=2)
    for backend in ("eager", "lean"):
        options = FAST | {"backend": backend}
        made = split.generate(range(5), seeds=seeds, guidance_scale=scales, **options)
        for i, scale in enumerate(scales):
            alone = engine.generate([i], seeds=[seeds[i]], guidance_scale=scale, **options)
            assert torch.equal(made.images[i], alone.images[0])
        assert made.settings["guidance_scale"] == scales


def test_noise_given_to_every_part_of_a_split_batch(engine: Engine) -> None:
    given = {"latents": torch.randn(5, 4, 8, 8), "step_noise": torch.randn(4, 5, 4, 8, 8)}
    split = tiny_engine(max_batch_size=2).generate(range(5), **given, **FAST).images
    assert torch.equal(split, engine.generate(range(5), **given, **FAST).images)


@pytest.mark.parametrize("backend", ["eager", "lean"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_what_the_vae_decodes_in(engine: Engine, backend: str, precision: str) -> None:
    """float32 for fp16 too; bfloat16 is a hundred times as far from it."""
    options = {"seed": 1, "steps": 2, "backend": backend, "precision": precision}
    latents = engine.generate([1, 2], output="latent", **options).images
    pixels = engine.generate([1, 2], output="pt", **options).images
    assert engine.vae is not None
    with torch.no_grad():
        vae = copy.deepcopy(engine.vae).double()
        exact = vae.decode(latents.double() / vae.config.scaling_factor)
    error = (pixels - (exact.clamp(-1, 1) + 1) / 2).abs().max()
    assert (error > 1e-4) if precision == "bf16" else (error < 1e-5)


def test_outputs(engine: Engine) -> None:
    options = {"steps": 2, "seed": 1}
    pil = engine.generate([1, 2], **options).images
    array = engine.generate([1, 2], output="np", **options).images
    tensor = engine.generate([1, 2], output="pt", **options).images
    latents = engine.generate([1, 2], output="latent", **options).images
    assert array.dtype == np.uint8 and array.shape == (2, 16, 16, 3)
    assert [i.size for i in pil] == [(16, 16)] * 2
    assert np.array_equal(np.stack([np.asarray(i) for i in pil]), array)
    assert tensor.shape == (2, 3, 16, 16) and tensor.min() >= 0 and tensor.max() <= 1
    assert np.abs(tensor.permute(0, 2, 3, 1).numpy() * 255 - array).max() <= 1.0
    assert engine.vae is not None
    with torch.inference_mode():
        decoded = engine.vae.decode(latents / engine.vae.config.scaling_factor)
    assert torch.allclose((decoded.clamp(-1, 1) + 1) / 2, tensor, atol=1e-6)


def test_an_engine_without_vae_gives_latents() -> None:
    engine = tiny_engine(vae=False)
    assert engine.generate([1], steps=2, seed=0).images.shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match="output 'pil' needs a VAE"):
        engine.generate([1], steps=2, output="pil")


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.05), ("fp16", 0.01)])
def test_precisions_stay_near_float32(engine: Engine, precision: str, bound: float) -> None:
    exact = engine.generate([1, 2], seed=0, guidance_scale=1.5, **FAST).images
    rounded = engine.generate([1, 2], seed=0, guidance_scale=1.5, precision=precision, **FAST)
    error = ((rounded.images - exact).norm() / exact.norm()).item()
    assert 0 < error < bound


@pytest.mark.slow
def test_compile_equals_eager(engine: Engine) -> None:
    eager = engine.generate([1, 2], seed=0, backend="eager", **FAST).images
    compiled = engine.generate([1, 2], seed=0, backend="compile", **FAST).images
    assert ((compiled - eager).norm() / eager.norm()).item() < 1e-4


def test_four_threads_share_a_fresh_engine(engine: Engine) -> None:
    options = {"steps": 4, "output": "np"}
    expected = [engine.generate([i] * 2, seed=i, **options).images for i in range(4)]
    shared = tiny_engine()  # its backend and decoder are made while four threads ask for them
    results: list[list[np.ndarray]] = [[] for _ in range(4)]

    def work(i: int) -> None:
        for _ in range(3):
            results[i].append(shared.generate([i] * 2, seed=i, **options).images)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert len(results[i]) == 3
        for images in results[i]:
            assert np.array_equal(images, expected[i])


def test_threads_hold_while_generating_and_only_in_its_thread() -> None:
    engine, before = tiny_engine(threads=1), torch.get_num_threads()
    torch.set_num_threads(2)
    seen: list[int] = []
    fresh: list[int] = []

    def count() -> None:
        torch.zeros(1).add_(1)  # the first use of torch in this thread
        fresh.append(torch.get_num_threads())

    def callback(_: object) -> None:
        seen.append(torch.get_num_threads())
        thread = threading.Thread(target=count)
        thread.start()
        thread.join()

    try:
        engine.generate(1, seed=0, callback=callback, **FAST)
        callback(None)
        assert seen == [1] * 4 + [2] and fresh == [2] * 5
        with pytest.raises(ValueError, match=r"^labels? "):
            engine.generate(99, **FAST)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match=r"^threads 0 is not a positive integer$"):
        tiny_engine(threads=0)


def test_what_a_generation_records(engine: Engine) -> None:
    z, draws = torch.zeros(1, 4, 8, 8), torch.ones(4, 1, 4, 8, 8)
    plain = engine.generate(1, seed=3, **FAST)
    assert plain.seeds == [3]
    assert plain.settings == {
        "model": "memory", "numerics": "official", "version": __version__, "sampler": "ddpm",
        "steps": 4, "spacing": "official", "eta": 0.0, "guidance_scale": 4.0,
        "guidance_channels": 3, "guidance_interval": None, "noise": "per-image",
        "precision": "fp32", "backend": "lean",
    }  # fmt: skip
    given = engine.generate(1, seed=3, latents=z, step_noise=draws, **FAST)
    assert given.seeds is None  # no random number was drawn
    assert given.settings["latents_sha256"] == hashlib.sha256(bytes(4 * z.numel())).hexdigest()
    assert "step_noise_sha256" in given.settings and "latents_sha256" not in plain.settings
    assert engine.generate(1, seed=3, latents=z, **FAST).seeds == [3]  # for ddpm's steps
    assert engine.generate(1, latents=z, sampler="ddim", **FAST).seeds is None


def test_what_is_printed_is_short(engine: Engine) -> None:
    """Shapes in the place of thousands of numbers, and no addresses."""
    told: list[Progress] = []
    z = engine.generate([1, 2], seed=3, callback=told.append, **FAST)
    assert repr(told[-1]) == (
        "Progress(step=4, steps=4, first=0, count=2, total=2, latents=<float32 (2, 4, 8, 8)>)"
    )
    assert repr(z) == (
        f"Generation(images=<float32 (2, 4, 8, 8)>, labels=[1, 2], seeds=[3, 4], "
        f"settings={z.settings}, label_names=['bee', 'cat'])"
    )
    for output, shown in (("pil", "[1 PIL of 16x16]"), ("np", "<uint8 (1, 16, 16, 3)>")):
        made = engine.generate(1, steps=1, output=output)
        assert isinstance(made, Generation) and f"images={shown}, labels" in repr(made)
    settings = z.settings | {"output": "latent"}
    for key in ("model", "numerics", "version"):
        del settings[key]
    given = dict.fromkeys(("seed", "latents", "step_noise"))
    planned = engine.plan([1], seeds=[3], **settings, **given).result(None)
    assert repr(planned).startswith("Generation(images=None, labels=[1], seeds=[3], ")
    assert repr(engine) == (
        "Engine(model='memory', depth=2, hidden_size=48, patch_size=2, num_classes=10, "
        "image_size=16, device='cpu')"
    )


class Limited(Backend):
    """A backend that runs out of memory above ``rows`` rows."""

    def __init__(self, inner: Backend, rows: int) -> None:
        self.inner, self.rows = inner, rows

    def prepare(self, labels: torch.Tensor, timesteps: torch.Tensor) -> Denoiser:
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
def test_out_of_memory_in_the_vae_decodes_in_slices(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, then image by image, then in tiles of half the side (bf16: fp32 is never whole)."""
    engine = tiny_engine()
    options = {"steps": 2, "seed": 1, "output": "pt", "precision": "bf16", "backend": backend}
    expected = engine.generate([1, 2], **options).images
    limit = {"numel": 4 * 8 * 8}

    def limited(decode: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def refuse(decoder: object, z: torch.Tensor) -> torch.Tensor:
            if z.numel() > limit["numel"]:
                raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")
            return decode(decoder, z)

        return refuse

    monkeypatch.setattr(AutoencoderKL, "decode", limited(AutoencoderKL.decode))
    monkeypatch.setattr(LeanDecoder, "__call__", limited(LeanDecoder.__call__))
    with pytest.warns(UserWarning, match="decoding image by image"):
        images = engine.generate([1, 2], **options).images
    assert torch.allclose(images, expected, atol=0.02)  # bfloat16 in another order of summation
    limit["numel"] = 4 * 4 * 4
    with pytest.warns(UserWarning, match="decoding in tiles"):
        tiled = engine.generate([1, 2], **options).images
    assert tiled.shape == expected.shape
    limit["numel"] = 0
    with (
        pytest.warns(UserWarning, match="in tiles"),
        pytest.raises(MemoryError, match="with tiles of 4 latents"),
    ):
        engine.generate([1, 2], **options)


BAD = [
    ({"labels": -1}, "label -1 is out of range; allowed are 0 to 9"),
    ({"steps": 0}, "steps 0"),
    ({"steps": 1001}, "steps 1001"),
    ({"steps": 2.5}, "steps 2.5"),
    ({"sampler": "euler"}, "sampler 'euler': choose one of ddpm, ddim, dpm"),
    ({"eta": -1.0}, "eta -1.0"),
    ({"eta": 0.5}, "eta 0.5 is for sampler 'ddim', not 'ddpm'"),
    ({"spacing": "cosine"}, "spacing 'cosine': choose one of official"),
    ({"guidance_scale": [1.0, 2.0, 3.0]}, "guidance_scale of shape (3,) for 2 images"),
    ({"guidance_channels": 5}, "guidance_channels 5 is out of range: allowed is 1 to 4"),
    ({"guidance_interval": (5.0, 0.5)}, "guidance_interval (5.0, 0.5) is upside down"),
    ({"seed": -1}, "seed -1 is not a whole number"),
    ({"seed": "7"}, "seed '7' is not a whole number"),
    ({"seed": 1.0}, "seed 1.0 is not a whole number"),
    ({"seed": True}, "seed True is not a whole number"),
    ({"seed": [1, 2]}, "seed holds 2 numbers: give them as seeds, one per image"),
    ({"seed": np.arange(2)}, "seed holds 2 numbers: give them as seeds"),
    ({"seed": 1, "seeds": [1, 2]}, "give one of the two"),
    ({"seeds": [1]}, "seeds holds 1 number for 2 labels; one per label is needed"),
    ({"labels": 1, "seeds": [1, 2]}, "seeds holds 2 numbers for 1 label; one per label"),
    ({"seeds": 1}, "seeds 1 is not one number per label: give seed, or a list"),
    ({"noise": "pink"}, "noise 'pink': choose one of per-image, official"),
    ({"latents": torch.zeros(1, 4, 8, 8)}, "latents has shape (1, 4, 8, 8); (2, 4, 8, 8)"),
    ({"latents": torch.full((2, 4, 8, 8), torch.nan)}, "latents holds NaN"),
    ({"step_noise": torch.zeros(3, 2, 4, 8, 8)}, "step_noise has shape (3, 2, 4, 8, 8)"),
    ({"backend": "magic"}, "backend 'magic' is unknown; choose one of auto, eager"),
    ({"backend": "onnx"}, "backend 'onnx' is unknown; did you mean 'onnxruntime'? choose one"),
    ({"backend": "torch.compile"}, "did you mean 'compile'?"),
    ({"guidance_scale": -1}, "guidance_scale -1.0 is negative: 0 and above are allowed, 1 is none"),
    ({"guidance_scale": [4, -0.5]}, "guidance_scale -0.5 is negative"),
    ({"precision": "fp4"}, "precision 'fp4': choose one of fp32, bf16, fp16"),
    ({"output": "gif"}, "output 'gif': choose one of pil, np, pt, latent"),
]


@pytest.mark.parametrize(
    ("keyword", "ours"),
    [("num_inference_steps", "steps"), ("num_sampling_steps", "steps"), ("step", "steps"),
     ("cfg_scale", "guidance_scale"), ("output_type", "output"), ("generator", "seed")],
)  # fmt: skip
def test_other_projects_keywords(engine: Engine, keyword: str, ours: str) -> None:
    message = rf"^generate\(\) has no keyword '{keyword}'; it is called '{ours}' here$"
    with pytest.raises(TypeError, match=message):
        engine.generate([1], **{keyword: 3})


@pytest.mark.parametrize(("options", "message"), BAD, ids=[m[:30] for _, m in BAD])
def test_bad_input_is_one_line(engine: Engine, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        engine.generate(**({"labels": [1, 2], "steps": 2} | options))
    assert "\n" not in str(caught.value)
