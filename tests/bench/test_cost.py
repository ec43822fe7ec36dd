"""Formulas against the paper's table, torch's flop counter and the modules' own parameters."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from published import GMACS_AND_MILLIONS
from torch.utils.flop_counter import FlopCounterMode

from dit_bench import cli, cost, unet
from dit_bench.cost import (
    TOLERANCE,
    Cost,
    count_model,
    decoder_record,
    dit_cost,
    model_parts,
    total,
    vae_decoder_cost,
)
from dit_bench.gflops import GFLOPS, MILLION_PARAMETERS, gflops_report
from dit_engine.config import PUBLISHED, ModelConfig
from dit_engine.model import DiT
from dit_engine.vae import AutoencoderKL, VAEConfig


def assert_as_printed(value: float, printed: float, last_digit: float) -> None:
    assert abs(value - printed) <= max(1e-3 * printed, last_digit / 2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_sizes_are_the_papers(name: str) -> None:
    config = ModelConfig.named(name)
    found = total(dit_cost(config))
    gmacs, million_parameters = GMACS_AND_MILLIONS[name]
    assert_as_printed(found.macs / 1e9, gmacs, 0.01)
    assert found.flops == 2 * found.macs
    trained = found.parameters - config.num_tokens * config.hidden_size  # less the position table
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
    found = total(dit_cost(config))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(x, index, index)
    assert counter.get_total_flops() == 3 * found.flops


@pytest.mark.parametrize(("name", "size"), [("XL/2", 256), ("XL/2", 512), ("B/4", 256)])
def test_parts_equal_torchs_counter_by_module(name: str, size: int) -> None:
    config = ModelConfig.named(name, size)
    parts, seen = model_parts(config), count_model(config)
    assert parts.keys() == seen.keys()
    for part, found in parts.items():
        assert abs(found.flops - seen[part]) <= TOLERANCE * found.flops, part
    assert total(parts) == total(dit_cost(config))


def test_a_formula_that_is_off_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "vae_decoder_cost", lambda *_: {"all": Cost(1, 10**9)})
    with pytest.raises(AssertionError, match="torch counts"):
        decoder_record(VAEConfig(), 32)


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
    found = total(vae_decoder_cost(config, side))
    modules = (vae.decoder, vae.post_quant_conv)
    assert found.parameters == sum(p.numel() for m in modules for p in m.parameters())
    with FlopCounterMode(display=False) as counter:
        vae.decode(z)
    assert counter.get_total_flops() == 2 * found.flops


def test_costs_add_and_multiply() -> None:
    assert total([Cost(1, 2), Cost(3, 4) * 2]) == Cost(7, 10)
    with pytest.raises(ValueError, match="latent_side 0"):
        vae_decoder_cost(VAEConfig(), 0)


def test_the_constants_are_the_papers_and_the_report_holds_every_network() -> None:
    ours = {f"DiT-{k}": (GFLOPS[256][k], MILLION_PARAMETERS[k]) for k in GFLOPS[256]}
    assert ours == GMACS_AND_MILLIONS
    rows = {row["case"]: row for row in gflops_report((256,))["rows"]}
    assert len(rows) == 12 + 2
    for name, published in GFLOPS[256].items():
        found = rows[name]["total"]
        assert found["macs"] / 1e9 == pytest.approx(published, rel=2e-3, abs=5e-3)
        assert round(found["trained_parameters"] / 1e6) == MILLION_PARAMETERS[name]
        assert found["flops"] == 2 * found["macs"]


@pytest.mark.skipif(find_spec("diffusers") is None, reason="no diffusers")
def test_the_unet_is_the_papers_and_the_command_prints_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = unet.unet_cost()
    assert found.macs == 104_227_160_064
    assert found.macs / 1e9 == pytest.approx(unet.PUBLISHED_GFLOPS, rel=0.01)
    assert found.parameters / 1e6 == pytest.approx(400.92, abs=0.01)  # the published checkpoint's
    assert cli.main(["gflops", "--size", "256"]) == 0
    shown = capsys.readouterr().out
    for text in ("118.62", "118.64", "311.09", "LDM-4 U-Net", "104.23", "103.60", "237.24"):
        assert text in shown, text
    assert cli.main(["gflops", "--size", "512", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert next(r for r in rows if r["case"] == "XL/2")["published_gflops"] == 524.60
