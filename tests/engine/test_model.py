"""The reference model against the original's vectors, the paper's table and independent formulas.

See reference_embedding.py for why the vectors' time embeddings are recovered from the vectors.
"""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close_to_reference
from published import GMACS_AND_MILLIONS
from reference_embedding import fit_time_embedding, one_ulp_effect
from torch import Tensor
from vectors import Vectors

from dit_engine.config import PUBLISHED, ModelConfig
from dit_engine.model import DiT, timestep_embedding
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


def meta_model(config: ModelConfig) -> DiT:
    with torch.device("meta"):
        return DiT(config)


def test_parameter_counts_are_the_papers() -> None:
    for name in PUBLISHED:
        parameters = meta_model(ModelConfig.named(name)).parameters()
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        assert round(trained / 1e6) == GMACS_AND_MILLIONS[name][1]


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
