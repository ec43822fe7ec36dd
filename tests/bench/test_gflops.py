"""The table of costs against the published one; the U-Net against its published cost."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from published import GMACS_AND_MILLIONS

from dit_bench import cli, counted, unet
from dit_bench.cost import Cost, dit_cost, total
from dit_bench.counted import TOLERANCE, count_model, decoder_record, model_parts, model_record
from dit_bench.gflops import gflops_report
from dit_bench.published import GFLOPS_256, MILLION_PARAMETERS
from dit_engine.config import ModelConfig
from dit_engine.vae import VAEConfig

needs_diffusers = pytest.mark.skipif(find_spec("diffusers") is None, reason="no diffusers")


def test_the_constants_are_the_papers() -> None:
    ours = {f"DiT-{k}": (GFLOPS_256[k], MILLION_PARAMETERS[k]) for k in GFLOPS_256}
    assert ours == GMACS_AND_MILLIONS


@pytest.mark.parametrize(("name", "size"), [("XL/2", 256), ("XL/2", 512), ("S/8", 256)])
def test_parts_equal_torchs_counter(name: str, size: int) -> None:
    config = ModelConfig.named(name, size)
    parts, seen = model_parts(config), count_model(config)
    assert parts.keys() == seen.keys()
    for part, cost in parts.items():
        assert abs(cost.flops - seen[part]) <= TOLERANCE * cost.flops, part
    assert total(parts) == total(dit_cost(config))


def test_a_formula_that_is_off_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "vae_decoder_cost", lambda *_: {"all": Cost(1, 10**9)})
    with pytest.raises(AssertionError, match="torch counts"):
        decoder_record(VAEConfig(), 32)


@needs_diffusers
def test_the_unet_is_the_papers() -> None:
    cost = unet.unet_cost()
    assert cost.macs == 104_227_160_064
    assert cost.macs / 1e9 == pytest.approx(unet.PUBLISHED_GFLOPS, rel=0.01)
    assert cost.parameters / 1e6 == pytest.approx(400.92, abs=0.01)  # the published checkpoint's


def test_the_report_holds_every_network() -> None:
    report = gflops_report((256,))
    rows = {row["network"]: row for row in report["rows"]}
    assert len(rows) == 12 + 2
    for name, published in GFLOPS_256.items():
        found = rows[name]["total"]
        assert found["macs"] / 1e9 == pytest.approx(published, rel=2e-3, abs=5e-3)
        assert round(found["trained_parameters"] / 1e6) == MILLION_PARAMETERS[name]
        assert found["flops"] == 2 * found["macs"]
    record = model_record(ModelConfig.named("XL/2"))
    shares = {k: v["macs"] / record["total"]["macs"] for k, v in record["parts"].items()}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["adaln"] == pytest.approx(0.002, abs=5e-4)


@needs_diffusers
def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gflops", "--size", "256"]) == 0
    shown = capsys.readouterr().out
    for text in ("118.62", "118.64", "311.09", "LDM-4 U-Net", "104.23", "103.60", "237.24"):
        assert text in shown, text
    assert cli.main(["gflops", "--size", "512", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert next(r for r in rows if r["network"] == "XL/2")["published_gflops"] == 524.60
