"""NaN and overflow are an error that names the images, the first step and what helps."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NAMES, tiny_dit, tiny_engine, tiny_vae

from dit_engine import Engine
from dit_engine.backends import Backend, create_backend
from dit_engine.checkpoint import save_pretrained
from dit_engine.cli.generate import main
from dit_engine.decode import to_uint8
from dit_engine.errors import NotFinite


def broken(part: str, key: str, value: float = torch.nan) -> Engine:
    engine = tiny_engine()
    getattr(engine, part).state_dict()[key].view(-1)[0] = value
    return engine


@pytest.mark.parametrize(("backend", "output"), [("lean", "pil"), ("eager", "latent")])
def test_a_nan_weight(backend: str, output: str) -> None:
    engine = broken("model", "blocks.1.attn.qkv.weight")
    told = (
        r"^image 0 \(label 3 'dog', seed 7\), image 1 \(label 2 'cat', seed 8\) are not finite "
        r"from step 1 of 3 on: .*precision 'bf16' or 'fp32', .*guidance_scale, .*check_finite"
    )
    with pytest.raises(NotFinite, match=told):
        engine.generate([3, 2], seed=7, steps=3, backend=backend, output=output)


class Overflowing(Backend):
    """A backend whose answer is not finite from a step on, for images of one label."""

    def __init__(self, engine: Engine, step: int, label: int) -> None:
        self.inner = create_backend("eager", engine.model, "fp32", engine.device)
        self.step, self.label, self.calls = step, label, 0

    def prepare(self, labels: torch.Tensor, timesteps: torch.Tensor) -> Any:
        denoise = self.inner.prepare(labels, timesteps)

        def overflows(x: torch.Tensor, step: int) -> torch.Tensor:
            self.calls += 1
            output = denoise(x, step)
            if step >= self.step:
                output[labels[: len(x)] == self.label] = torch.inf
            return output

        return overflows


def test_the_step_is_found_by_sampling_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(max_batch_size=2)
    backend = Overflowing(engine, step=2, label=5)
    monkeypatch.setattr(engine, "_backend", lambda *_: backend)
    options = {"seeds": [1, 2, 3, 4, 5], "steps": 4, "output": "latent"}
    steps: list[tuple[int, int]] = []

    def callback(progress: Any) -> None:
        steps.append((progress.first, progress.step))

    engine.generate([1, 2, 3, 4, 6], callback=callback, **options)
    assert backend.calls == 12 == len(steps)  # a run that is finite is sampled once
    steps.clear()
    told = r"^image 3 \(label 5 'fox', seed 4\) is not finite from step 3 of 4 on: "
    with pytest.raises(NotFinite, match=told):
        engine.generate([1, 2, 3, 5, 6], callback=callback, **options)
    assert backend.calls == 12 + 8 + 3
    assert steps == list(itertools.product((0, 2), (1, 2, 3, 4)))  # not called again


@pytest.mark.parametrize("backend", ["lean", "eager"])
def test_nan_in_the_vae(backend: str) -> None:
    engine = broken("vae", "decoder.conv_in.bias")
    options = {"seed": 7, "steps": 1, "backend": backend}
    engine.generate(3, output="latent", **options)
    told = r"^image 0 \(label 3 'dog', seed 7\) is not finite after the VAE's decoding: what helps"
    with pytest.raises(NotFinite, match=told):
        engine.generate(3, output="np", **options)


@pytest.mark.parametrize("backend", ["lean", "eager"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_guidance_that_overflows_is_not_clamped(backend: str, clip: float | None) -> None:
    model = tiny_dit(diffusion={"clip": clip})
    options = {"seed": 0, "steps": 3, "backend": backend}
    engine = Engine(model, device="cpu")
    engine.generate([3, 4], guidance_scale=1e6, **options)
    for scale in (1e38, [1.0, 1e300]):
        with pytest.raises(NotFinite, match=r"not finite .*a smaller guidance_scale"):
            engine.generate([3, 4], guidance_scale=scale, **options)


def test_pixels_that_are_not_finite_never_become_bytes() -> None:
    images = torch.zeros(3, 3, 2, 2)
    images[1, 0, 0, 0], images[2] = torch.inf, torch.nan
    with pytest.raises(NotFinite, match=r"^image 1, image 2 are not finite after the VAE's decod"):
        to_uint8(images)


def test_the_command_keeps_what_was_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Class 9 has a NaN for an embedding: the batches before its own are there, nothing else."""
    model = tiny_dit()
    model.y_embedder.embedding_table.weight.data[9, 0] = torch.nan
    save_pretrained(tmp_path / "model", model, tiny_vae(), NAMES)
    options = ["--model", str(tmp_path / "model"), "--device", "cpu", "--steps", "2", "--seed", "0"]
    options += ["--max-batch-size", "2", "-o", str(tmp_path / "out"), "--quiet"]
    assert main([*options, "--labels", "1", "2", "3", "9"]) == 2
    told = capsys.readouterr().err
    assert "(label 9 'jay', seed 3) is not finite from step 1 of 2 on" in told
    assert told.startswith("error: ") and told.count("\n") == 1
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == ["00000-bee-seed0.png", "00001-cat-seed1.png"]
