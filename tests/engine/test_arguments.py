"""Whatever is given as an argument is taken, or a ValueError of one line names the argument."""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_engine

from dit_engine import Engine
from dit_engine.results import call_record

Z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
NOISE = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
TWO = {"labels": [1, 2], "steps": 2, "output": "latent"}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


SCALE, INTERVAL = "is not a finite number of 0 or more", "is not a pair (low, high) with 0 ≤ low"
BAD: list[tuple[dict[str, Any], str]] = [
    ({"labels": -1}, "label -1 is out of range; allowed are 0 to 9"),
    *(({"steps": n}, "is out of range: allowed is 1 to 1000") for n in (0, 1001, 2.5, True)),
    ({"sampler": "euler"}, "sampler 'euler': choose one of ddpm, ddim, dpm"),
    ({"eta": -1.0}, "eta -1.0"),
    ({"eta": 0.5}, "eta 0.5 is for sampler 'ddim', not 'ddpm'"),
    ({"spacing": "cosine"}, "spacing 'cosine': choose one of official"),
    ({"guidance_scale": [1.0, 2.0, 3.0]}, "guidance_scale [1.0, 2.0, 3.0] for 2 images"),
    ({"guidance_scale": [4, -0.5]}, f"guidance_scale -0.5 {SCALE}"),
    ({"guidance_scale": math.nan}, f"guidance_scale nan {SCALE}"),
    ({"guidance_scale": np.ma.masked_array([4.0, 2.0], [False, True])}, SCALE),
    ({"guidance_channels": 5}, "guidance_channels 5 is out of range: allowed is 1 to 4"),
    ({"guidance_interval": (5.0, 0.5)}, f"guidance_interval (5.0, 0.5) {INTERVAL}"),
    *(({"guidance_interval": i}, INTERVAL) for i in ((1.0, 1.0), (math.nan, 1), (-1, 1), (1,), 3)),
    ({"seed": -1}, "seed -1 is not a whole number"),
    ({"seed": 2**63 - 1}, "seed 9223372036854775807 counts up to 9223372036854775808 for 2 labels"),
    ({"seed": [1, 2]}, "seed [1, 2] is not one number: give seeds, one per image"),
    ({"seed": 1, "seeds": [1, 2]}, "give one of the two"),
    ({"seeds": [1]}, "seeds [1]: give one per label (2), or seed"),
    ({"seeds": [1, 2], "noise": "official"}, "one generator for the batch: give seed"),
    ({"noise": "pink"}, "noise 'pink': choose one of per-image, official"),
    ({"latents": torch.zeros(1, 4, 8, 8)}, "latents has shape (1, 4, 8, 8); (2, 4, 8, 8)"),
    ({"latents": torch.full((2, 4, 8, 8), torch.nan)}, "latents holds NaN"),
    *(({"latents": z}, "is no tensor or array of floating-point numbers")
      for z in (Z.long(), Z.to("meta"), Z.to_sparse(), Z.to(torch.complex64), [[1.0], [1.0, 2]])),
    ({"step_noise": torch.zeros(3, 2, 4, 8, 8)}, "step_noise has shape (3, 2, 4, 8, 8)"),
    ({"backend": "onnx"}, "backend 'onnx' is unknown; did you mean 'onnxruntime'? choose one"),
    ({"backend": "torch.compile"}, "did you mean 'compile'?"),
    ({"precision": "fp4"}, "precision 'fp4': choose one of fp32, bf16, fp16"),
    ({"output": "gif"}, "output 'gif': choose one of pil, np, pt, latent"),
    ({"callback": 3}, "callback 3 is not callable"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD, ids=[m[:40] for _, m in BAD])
def test_bad_input_is_one_line(engine: Engine, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        engine.generate(**(TWO | options))
    assert "\n" not in str(caught.value)


ARGUMENTS = (
    "labels", "steps", "sampler", "spacing", "eta", "guidance_scale", "guidance_channels",
    "guidance_interval", "seed", "seeds", "noise", "latents", "step_noise", "backend", "precision",
    "output", "callback",
)  # fmt: skip


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("value", [object(), b"2", [[1], [1, 2]], torch.empty((), device="meta")])
def test_odd_values_of_any_argument(engine: Engine, argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=argument.rstrip("s")) as caught:
        engine.generate(**({"labels": [1], "steps": 2, "sampler": "ddim"} | {argument: value}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_numbers_of_every_type_are_plain_in_the_record(engine: Engine) -> None:
    plain = {"steps": 2, "guidance_scale": 2.5, "guidance_channels": 4,
             "guidance_interval": (0.5, 2.0), "sampler": "ddpm"}  # fmt: skip
    made = engine.generate(
        [1], steps=torch.tensor(2), guidance_scale=[Fraction(5, 2)], guidance_channels=np.int64(4),
        guidance_interval=torch.tensor([0.5, 2.0]), sampler=np.str_("ddpm"),
        seeds=np.array([7], np.uint64), output="latent",
    )  # fmt: skip
    assert plain.items() <= made.settings.items() and made.seeds == [7]
    json.dumps(call_record(made))


def test_noise_is_taken_as_any_array(engine: Engine) -> None:
    usual = {"labels": [1], "steps": 2, "output": "latent"}
    expected = engine.generate(**usual, latents=Z, step_noise=NOISE)
    made = engine.generate(**usual, latents=Z.numpy().astype(">f4"), step_noise=NOISE.tolist())
    assert torch.equal(made.images, expected.images)
    assert made.settings == expected.settings  # the digests too


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_heads", 0), ("vae_groups", "8"), ("vae_scaling_factor", 0.0), ("vae", ""),
        ("check_finite", 1), ("numerics", 1), ("threads", 0), ("source", None),
    ],
)  # fmt: skip
def test_odd_loading_arguments_are_named(name: str, value: object) -> None:
    options = {"source": "builtin", "device": "cpu"} | {name: value}
    with pytest.raises(ValueError, match=rf"^{'model' if name == 'source' else name} "):
        Engine.from_pretrained(**options)


@pytest.mark.parametrize("sources", ["memory", 5, {1: "a"}])
def test_sources_that_cannot_be_recorded(engine: Engine, sources: Any) -> None:
    with pytest.raises(ValueError, match=r"^sources "):
        Engine(engine.model, sources=sources)


@pytest.mark.parametrize(("keyword", "ours"), [("num_inference_steps", "steps"), ("step", "steps")])
def test_other_projects_keywords(engine: Engine, keyword: str, ours: str) -> None:
    message = rf"^generate\(\) has no keyword '{keyword}'; it is called '{ours}' here$"
    with pytest.raises(TypeError, match=message):
        engine.generate([1], **{keyword: 3})
