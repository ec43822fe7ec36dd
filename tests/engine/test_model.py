"""The reference model against the original's vectors, the paper's table and independent formulas.

See reference_embedding.py for why the vectors' time embeddings are recovered from the vectors.
"""

from __future__ import annotations

import math

import pytest
import torch
from numerics import assert_close_to_reference
from published import GMACS_AND_MILLIONS
from reference_embedding import fit_time_embedding, one_ulp_effect
from torch import Tensor
from vectors import Vectors

from dit_engine.config import PUBLISHED, ModelConfig
from dit_engine.model import DiT, position_embedding, timestep_embedding
from dit_engine.plan import parse_scales
from dit_engine.sampling.guidance import guided


def fit(vectors: Vectors, model: DiT) -> Tensor:
    """(N, D) the vectors' embedding of forward.t."""
    x, t, y, out = (vectors[f"forward.{name}"] for name in ("x", "t", "y", "out"))
    return fit_time_embedding(model, x.double(), t, y, out)


def test_forward_is_the_originals(vectors: Vectors) -> None:
    model = vectors.model()
    x, t, y, out = (vectors[f"forward.{name}"] for name in ("x", "t", "y", "out"))
    x = x.double()
    embedding = fit(vectors, model)
    fitted = model.forward_conditioned(x, embedding + model.y_embedder(y))
    assert_close_to_reference(fitted, out, tolerance=1e-10)

    # And the fitted embedding is the time embedding, as near as two machines' sinusoids are.
    for direct, expected, most in (
        (lambda: model.t_embedder(t), embedding, 2e-6),
        (lambda: model(x, t, y), out, 1e-6),
    ):
        one_ulp = one_ulp_effect(direct)
        assert one_ulp < most
        assert_close_to_reference(direct(), expected, tolerance=2 * one_ulp)


def test_guidance_is_the_originals_with_nothing_fitted_to_it(vectors: Vectors) -> None:
    """forward.out gives the time embedding; cfg.out is then predicted."""
    model = vectors.model()
    x, y = vectors["forward.x"].double(), torch.cat([vectors["forward.y"], vectors.null])
    c = fit(vectors, model).repeat(2, 1) + model.y_embedder(y)  # (2N, D)
    both = model.forward_conditioned(x.repeat(2, 1, 1, 1), c)
    denoise = guided(
        lambda z, k: model.forward_conditioned(z, c[: len(z)]),
        parse_scales(vectors.guidance_scale, len(x)),
    )
    expected = vectors["cfg.out"]  # (2N, 8, S, S); rows N … are the unconditional half's
    assert_close_to_reference(denoise(x, 0), expected[: len(x)], tolerance=1e-10)
    assert torch.equal(expected[len(x) :, :3], expected[: len(x), :3])
    assert_close_to_reference(both[len(x) :, 3:], expected[len(x) :, 3:], tolerance=1e-10)


def test_float32_forward(vectors: Vectors) -> None:
    model = vectors.model(torch.float32)
    out = model(vectors["forward.x"], vectors["forward.t"], vectors["forward.y"])
    assert out.dtype == torch.float32
    assert_close_to_reference(out, vectors["forward.out"], tolerance=1e-4)


def meta_model(config: ModelConfig) -> DiT:
    with torch.device("meta"):
        return DiT(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_papers(name: str) -> None:
    config = ModelConfig.named(name)
    trained = sum(p.numel() for p in meta_model(config).parameters() if p.requires_grad)
    assert round(trained / 1e6) == GMACS_AND_MILLIONS[name][1]
    # Counted by hand: embedders, blocks (attention 4D², MLP 8D², adaLN 6D²), final layer.
    d, p2 = config.hidden_size, config.patch_size**2
    embedders = (4 * p2 * d + d) + (256 * d + d + d * d + d) + 1001 * d
    block = (4 * d * d + 4 * d) + (8 * d * d + 5 * d) + (6 * d * d + 6 * d)
    final = (8 * p2 * d + 8 * p2) + (2 * d * d + 2 * d)
    assert trained == embedders + config.depth * block + final


def expected_shapes(depth: int, d: int, p: int, t: int, classes: int, out: int) -> dict:
    shapes = {
        "x_embedder.proj.weight": (d, 4, p, p), "x_embedder.proj.bias": (d,),
        "pos_embed": (1, t, d),
        "t_embedder.mlp.0.weight": (d, 256), "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d), "t_embedder.mlp.2.bias": (d,),
        "y_embedder.embedding_table.weight": (classes + 1, d),
        "final_layer.linear.weight": (p * p * out, d), "final_layer.linear.bias": (p * p * out,),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.adaLN_modulation.1.bias": (2 * d,),
    }  # fmt: skip
    linears = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d),
               "mlp.fc2": (d, 4 * d), "adaLN_modulation.1": (6 * d, d)}  # fmt: skip
    for i in range(depth):
        for name, shape in linears.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
    return shapes


@pytest.mark.parametrize(
    ("image_size", "overrides", "tokens", "classes", "out"),
    [
        (512, {}, 1024, 1000, 8),
        (256, {"num_classes": 24, "learn_sigma": False}, 256, 24, 4),
    ],
)
def test_xl_2_state_dict(
    image_size: int, overrides: dict, tokens: int, classes: int, out: int
) -> None:
    model = meta_model(ModelConfig.named("DiT-XL/2", image_size, **overrides))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert len(shapes) == 292
    assert shapes == expected_shapes(28, 1152, 2, tokens, classes, out)
    assert not model.pos_embed.requires_grad


@pytest.mark.parametrize(("d", "side"), [(48, 4), (1152, 16)])
def test_position_embedding_by_a_scalar_formula(d: int, side: int) -> None:
    table = position_embedding(d, side)
    assert table.shape == (1, side * side, d)
    assert table.dtype == torch.float32
    for row in (0, 1, side - 1):
        for column in (0, 2, side - 1):
            for channel in (0, 1, d // 4, d // 2 - 1, d // 2, d // 2 + 3, 3 * d // 4, d - 1):
                position = column if channel < d // 2 else row
                wave = math.sin if channel % (d // 2) < d // 4 else math.cos
                expected = wave(position / 10000 ** ((channel % (d // 4)) / (d // 4)))
                got = table[0, row * side + column, channel].item()
                assert got == pytest.approx(expected, abs=6e-8)


def test_position_embedding_is_the_one_in_the_vectors(vectors: Vectors) -> None:
    stored = vectors["state_dict.pos_embed"]
    side = vectors.config.input_size // vectors.config.patch_size
    ours = position_embedding(vectors.config.hidden_size, side)
    assert_close_to_reference(ours, stored, tolerance=1e-7)


@pytest.mark.parametrize(("spacing", "shift"), [(128, 0), (127, 1)])
def test_timestep_embedding_is_diffusers_with_its_frequency_shift(spacing: int, shift: int) -> None:
    Timesteps = pytest.importorskip("diffusers.models.embeddings").Timesteps
    t = torch.arange(1000)
    theirs = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=shift)(t)
    ours = timestep_embedding(t, spacing)
    assert ours.dtype == torch.float32
    # Frequencies may round differently by an ulp, which t multiplies by up to 999: 6e-5.
    assert (ours - theirs).abs().max() < 6.2e-5
    assert (ours[:100] - theirs[:100]).abs().max() < 6.2e-6


def test_the_two_numerics_are_different_functions_of_time() -> None:
    official, diffusers = (timestep_embedding(torch.tensor([999]), s) for s in (128, 127))
    assert torch.cosine_similarity(official, diffusers).item() == pytest.approx(0.49, abs=0.01)
    config = ModelConfig(1, 24, 2, 2, 4)
    spacings = {
        n: ModelConfig(**{**config.to_dict(), "numerics": n}) for n in ("official", "diffusers")
    }
    assert {n: DiT(c).t_embedder.spacing for n, c in spacings.items()} == {
        "official": 128, "diffusers": 127,
    }  # fmt: skip


def test_a_new_model_starts_as_the_papers_identity() -> None:
    """adaLN-Zero: blocks change nothing and the output is zero."""
    torch.manual_seed(0)
    model = DiT(ModelConfig(2, 48, 2, 2, 8, num_classes=3))
    model.initialize_weights()
    x, c = torch.randn(2, 16, 48), torch.randn(2, 48)
    assert torch.equal(model.blocks[1](x, c), x)
    assert not model(torch.randn(2, 4, 8, 8), torch.tensor([5, 9]), torch.tensor([0, 3])).any()
    spread = model.t_embedder.mlp[2].weight.std().item()
    assert spread == pytest.approx(0.02, rel=0.1)
