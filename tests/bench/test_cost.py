"""Formulas against the paper's table, torch's flop counter and the modules' own parameters."""

from __future__ import annotations

import pytest
import torch
from published import GMACS_AND_MILLIONS
from torch.utils.flop_counter import FlopCounterMode

from dit_bench.cost import Cost, dit_cost, total, vae_decoder_cost
from dit_engine.config import PUBLISHED, ModelConfig
from dit_engine.model import DiT
from dit_engine.vae import AutoencoderKL, VAEConfig


def assert_as_printed(value: float, printed: float, last_digit: float) -> None:
    assert abs(value - printed) <= max(1e-3 * printed, last_digit / 2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_sizes_are_the_papers(name: str) -> None:
    config = ModelConfig.named(name)
    cost = total(dit_cost(config))
    gmacs, million_parameters = GMACS_AND_MILLIONS[name]
    assert_as_printed(cost.macs / 1e9, gmacs, 0.01)
    assert cost.flops == 2 * cost.macs
    trained = cost.parameters - config.num_tokens * config.hidden_size  # less the position table
    assert round(trained / 1e6) == million_parameters


def test_512_px_and_shares() -> None:
    parts = dit_cost(ModelConfig.named("XL/2", image_size=512))
    whole = total(parts)
    assert_as_printed(whole.macs / 1e9, 524.60, 0.01)
    assert parts["attention_core"].macs / whole.macs == pytest.approx(0.129, abs=5e-4)
    parts = dit_cost(ModelConfig.named("XL/2"))
    whole = total(parts)
    assert parts["attention_core"].macs / whole.macs == pytest.approx(0.036, abs=5e-4)
    assert parts["adaln"].parameters / whole.parameters == pytest.approx(0.33, abs=5e-3)
    assert parts["adaln"].macs / whole.macs == pytest.approx(0.002, abs=5e-4)


CONFIGS = [ModelConfig.named(name) for name in PUBLISHED] + [
    ModelConfig.named("XL/2", image_size=512),
    ModelConfig.named("S/4", num_classes=16, learn_sigma=False),
    ModelConfig(2, 48, 3, 2, 6, in_channels=3, num_classes=5, mlp_ratio=2.5),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.hidden_size}-{c.num_tokens}")
def test_equal_to_the_module_and_to_torchs_counter(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = DiT(config).requires_grad_(False)
        x = torch.empty(3, config.in_channels, config.input_size, config.input_size)
        index = torch.empty(3, dtype=torch.long)
    cost = total(dit_cost(config))
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(x, index, index)
    assert counter.get_total_flops() == 3 * cost.flops


def test_parts_equal_torchs_counter_by_module() -> None:
    config = ModelConfig.named("B/4")
    with torch.device("meta"):
        model = DiT(config).requires_grad_(False)
        x, index = torch.empty(1, 4, 32, 32), torch.empty(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(x, index, index)
    counted = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    parts = dit_cost(config)

    def of(ending: str) -> int:
        return sum(v for k, v in counted.items() if k.startswith("DiT.") and k.endswith(ending))

    assert parts["patch_embed"].flops == counted["DiT.x_embedder"]
    assert parts["conditioning"].flops == counted["DiT.t_embedder"]
    assert parts["mlp"].flops == of(".mlp") - counted["DiT.t_embedder.mlp"]
    assert (parts["attention_linear"] + parts["attention_core"]).flops == of(".attn")
    assert parts["adaln"].flops == of(".adaLN_modulation")
    assert parts["final"].flops == counted["DiT.final_layer.linear"]


def test_stable_diffusions_decoder() -> None:
    for side, printed in ((32, 311), (64, 1257)):
        macs = total(vae_decoder_cost(VAEConfig(), side)).macs
        assert_as_printed(macs / 1e9, printed, 1)


@pytest.mark.parametrize(
    ("config", "side"),
    [
        (VAEConfig(), 32),
        (VAEConfig(block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=8), 16),
        (
            VAEConfig(
                block_out_channels=(16, 48), norm_num_groups=8, mid_block_add_attention=False
            ),
            8,
        ),
    ],
)
def test_decoder_equals_the_module_and_torchs_counter(config: VAEConfig, side: int) -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(config).requires_grad_(False)
        z = torch.empty(2, config.latent_channels, side, side)
    cost = total(vae_decoder_cost(config, side))
    modules = (vae.decoder, vae.post_quant_conv)
    assert cost.parameters == sum(p.numel() for m in modules for p in m.parameters())
    with FlopCounterMode(display=False) as counter:
        vae.decode(z)
    assert counter.get_total_flops() == 2 * cost.flops


def test_costs_add_and_multiply() -> None:
    assert total([Cost(1, 2), Cost(3, 4) * 2]) == Cost(7, 10)
    with pytest.raises(ValueError, match="latent_side 0"):
        vae_decoder_cost(VAEConfig(), 0)
