"""Formulas against the paper's table, torch's flop counter and the modules' own parameters."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from published import GMACS_AND_MILLIONS
from tiny import tiny_dit

from dit_bench import cli, cost
from dit_bench.cost import PAPER, Cost, counted, decoder_record, dit_cost, total
from dit_engine.config import PUBLISHED, ModelConfig
from dit_engine.model import DiT
from dit_engine.vae import VAEConfig


def assert_as_printed(value: float, printed: float, last_digit: float) -> None:
    assert abs(value - printed) <= max(1e-3 * printed, last_digit / 2)


def test_all_sizes_are_the_papers() -> None:
    assert {f"DiT-{name}": published for name, published in PAPER.items()} == GMACS_AND_MILLIONS
    for name in PUBLISHED:
        config = ModelConfig.named(name)
        found = total(dit_cost(config))
        assert_as_printed(found.macs / 1e9, GMACS_AND_MILLIONS[name][0], 0.01)
        trained = found.parameters - config.num_tokens * config.hidden_size  # less the positions
        assert round(trained / 1e6) == GMACS_AND_MILLIONS[name][1]
    assert_as_printed(total(dit_cost(ModelConfig.named("XL/2", 512))).macs / 1e9, 524.60, 0.01)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig.named("S/8"),
        ModelConfig.named("B/4", image_size=512, num_classes=16, learn_sigma=False),
        ModelConfig(2, 48, 3, 2, 6, in_channels=3, num_classes=5, mlp_ratio=2.5),
    ],
    ids=lambda c: f"{c.hidden_size}-{c.num_tokens}",
)
def test_every_part_equals_the_modules_and_torchs_counter(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = DiT(config).requires_grad_(False)
        x = torch.empty(1, config.in_channels, config.input_size, config.input_size)
        index = torch.empty(1, dtype=torch.long)
        c = torch.empty(1, config.hidden_size)
    assert counted(model, lambda: model(x, index, index)) == total(dit_cost(config))
    without = counted(model, lambda: model.forward_conditioned(x, c)).macs
    parts = dit_cost(config)
    assert total(parts).macs - parts["conditioning"].macs == without


def test_a_formula_that_is_off_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "FREQUENCY_EMBEDDING_SIZE", 10**5)
    with pytest.raises(AssertionError, match="torch counts"):
        cost.model_record(ModelConfig.named("S/8"))


def test_stable_diffusions_decoder_is_counted() -> None:
    for side, printed in ((32, 311), (64, 1257)):
        found = decoder_record(VAEConfig(), side)
        assert_as_printed(found["macs"] / 1e9, printed, 1)
        assert found["flops"] == found["counted_flops"] == 2 * found["macs"]
        assert found["parameters"] == 49_490_199  # of diffusers' post_quant_conv and decoder


def test_weights_that_every_forward_reads() -> None:
    model, hoisted = tiny_dit(), ("t_embedder", "y_embedder")
    read = sum(
        p.numel()
        for name, p in model.named_parameters()
        if not name.startswith(hoisted) and "adaLN_modulation" not in name
    )
    assert cost.needed_weights(model.config) == read
    assert Cost(3, 4) * 2 + Cost(1, 2) == Cost(7, 10)


@pytest.mark.skipif(find_spec("diffusers") is None, reason="no diffusers")
def test_the_unet_is_the_papers_and_the_command_prints_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = cost.unet_cost()
    assert found.macs == 104_227_160_064
    assert found.macs / 1e9 == pytest.approx(cost.UNET_GFLOPS, rel=0.01)
    assert found.parameters / 1e6 == pytest.approx(400.92, abs=0.01)  # the published checkpoint's
    monkeypatch.setattr(cost, "PAPER", {"XL/2": PAPER["XL/2"]})
    assert cli.main(["gflops", "--size", "256"]) == 0
    shown = capsys.readouterr().out
    for text in ("118.62", "118.64", "311.09", "LDM-4 U-Net", "104.23", "103.60", "237.24"):
        assert text in shown, text
    monkeypatch.setattr(cost, "PAPER", {"S/8": PAPER["S/8"]})
    assert cli.main(["gflops", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 5 and rows[0]["published_gflops"] == 0.36
    assert round(rows[0]["total"]["trained_parameters"] / 1e6) == 33
