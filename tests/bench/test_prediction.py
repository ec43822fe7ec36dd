"""Compares the predicted bytes and operations of a step's kernels with the tensors of their calls
and with torch's FLOP counter, and tests the table of predictions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_up
import pytest
import torch
from tiny import tiny_dit
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dit_bench import prediction
from dit_bench.cli import main
from dit_bench.cost import dit_cost, total
from dit_bench.prediction import GAP_US, TILE_US, Kernel, Rates, floor_us, predicted_us
from dit_bench.report import read
from dit_bench.show.documents import prediction_tables, update_document
from dit_engine.backends.lean.forward import LeanTransformer
from dit_engine.config import ModelConfig
from dit_kernels import PackedLinear, operators

ROOT = Path(__file__).resolve().parents[2]
META = torch.device("meta")
ROWS = 4
CONFIG = ModelConfig(3, 96, 2, 2, 8, num_classes=5)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def calls(splits: int | None) -> dict[str, Callable[[], tuple[Any, ...]]]:
    """Kernel → the tensors that its call reads and writes, without the weights of a product."""
    t, d, hidden = CONFIG.num_tokens, CONFIG.hidden_size, CONFIG.mlp_hidden_size
    x, y, qkv, wide = (empty(ROWS, t, w) for w in (d, d, 3 * d, hidden))
    vector, z = empty(ROWS, d), empty(ROWS // 2, 4, 8, 8, dtype=torch.float32)
    scales, nine = (empty(n, dtype=torch.float32) for n in (ROWS // 2, 9))
    out = empty(ROWS, t, 2 * 4 * 2 * 2)

    def linear(given: Tensor, outputs: int) -> tuple[Any, ...]:
        layer = PackedLinear(empty(outputs, given.shape[-1]), empty(outputs))
        return given, layer.weight, layer.bias, layer(given)

    def fused(given: Tensor) -> tuple[Any, ...]:
        """`product_gate_residual`, or `product_partial_sums`."""
        if splits is None:
            return (*linear(given, d)[:3], vector, x, x)
        return given, empty(d, given.shape[-1]), empty(splits, ROWS, t, d, dtype=torch.float32)

    def norm() -> tuple[Any, ...]:
        if splits is None:
            return x, vector, vector, operators.layernorm_modulate(x, vector, vector)
        given = x, y, vector, vector, vector
        made = operators.gate_residual_layernorm_modulate(*given)
        if splits:  # the sums in place of y, and the bias of the product
            return (*made, x, *given[2:], fused(x)[-1], empty(d))
        return (*given, *made)

    def step() -> tuple[Any, ...]:
        made = operators.guided_step(out, z, z, z, scales, nine, 3, 2)
        return out, z, z, z, *made  # the scales and coefficients are a few numbers

    return {
        "first norm": lambda: (x, vector, vector, operators.layernorm_modulate(x, vector, vector)),
        "qkv": lambda: linear(x, 3 * d), "attention": lambda: (qkv, operators.attention(qkv, 2)),
        "proj": lambda: fused(x) if splits != 0 else linear(x, d), "norm after proj": norm,
        "fc1 + GELU": lambda: linear(x, hidden),
        "fc2": lambda: fused(wide) if splits != 0 else linear(wide, d), "norm after fc2": norm,
        "final linear": lambda: linear(x, out.shape[-1]), "guided step": step,
        "embed": lambda: (z, *(empty(n, dtype=torch.float32) for n in (d * 16, d, t * d)), x),
        # 2 labels and the null class, of which the table has a row each.
        "select step": lambda: (empty(3, 20 * d), empty(ROWS, 20 * d)),
    }  # fmt: skip


@pytest.mark.parametrize("splits", [0, None, 3])
def test_bytes_are_those_of_the_calls_tensors(splits: int | None) -> None:
    kernels = {k.name: k for k in prediction.step_kernels(CONFIG, ROWS, splits)}
    with torch.inference_mode():
        found = {name: sum(t.nbytes for t in call()) for name, call in calls(splits).items()}
    assert found == {name: k.moved + k.read for name, k in kernels.items()}
    assert kernels["qkv"].read == 2 * (96 + 1) * 3 * 96  # bf16 weights and bias


def test_operations_equal_those_of_torchs_counter_and_launches_are_seven_per_block() -> None:
    kernels = {k.name: k for k in prediction.step_kernels(CONFIG, ROWS)}
    model = tiny_dit(depth=3, hidden_size=96, num_classes=5)
    assert model.config == CONFIG
    with torch.inference_mode():
        lean = LeanTransformer(model, torch.bfloat16, META)
        with FlopCounterMode(display=False) as counter:
            lean.forward(empty(ROWS, 16, 96), empty(ROWS, 20 * 96))
    embed = kernels.pop("embed")
    assert sum(k.launches * k.flops for k in kernels.values()) == counter.get_total_flops()
    parts = dit_cost(CONFIG)
    assert embed.flops == ROWS // 2 * parts["patch_embed"].flops  # both halves are one product
    hoisted = ("patch_embed", "conditioning", "adaln")
    whole = total({name: cost for name, cost in parts.items() if name not in hoisted})
    assert counter.get_total_flops() == ROWS * whole.flops
    xl = prediction.step_kernels(ModelConfig.named("XL/2"), 64)
    assert sum(k.launches for k in xl) == 7 * 28 + 5


def test_floors_and_predictions_in_closed_form() -> None:
    gpu = Rates(gb_s=1000, tflop_s=132)  # 1 TFLOP/s, 10⁶ a microsecond, on each multiprocessor
    few = Kernel("few", 1, moved=10**7, read=10**6)
    assert floor_us(few, gpu) == 1 and predicted_us(few, gpu) == GAP_US + 11
    assert floor_us(Kernel("many", 1, moved=10**8), gpu) == 100  # more than the L2 holds
    k = 10**6 // (2 * 128 * 128) * 4  # inputs
    for tiles, waves in ((132, 1), (133, 2)):
        made = Kernel("p", 1, 0, product=(128, k, 128 * tiles), flops=2 * 128 * k * 128 * tiles)
        tile = 2 * 128 * 128 * k / 10**6
        assert floor_us(made, gpu) == pytest.approx(tile * tiles / 132)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prediction, "TILES", (128,))
            patch.setattr(prediction, "feed_rate", lambda _: 1.0)
            assert predicted_us(made, gpu) == pytest.approx(GAP_US + waves * (tile + TILE_US))
            split = predicted_us(made, gpu, splits=4)  # 528 or 532 tiles of a quarter
            assert split == pytest.approx(GAP_US + (3 + waves) * (tile / 4 + TILE_US))
    # 160 cycles of shared memory for 128 of arithmetic, and 256 for 256.
    assert (prediction.feed_rate(128), prediction.feed_rate(256)) == (0.8, 1.0)
    attention = Kernel("a", 1, 0, flops=72 * 132 * 10**6, exponentials=132 * 10**4)
    assert predicted_us(attention, gpu) == pytest.approx(GAP_US + 80 + 2.56)


def committed() -> dict[str, Any] | None:
    found = sorted((ROOT / "benchmarks/results").glob("gpu-*.json"))
    return read(found[-1], "gpu") if found else None


def test_the_document_shows_the_predictions_and_what_was_measured() -> None:
    text = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    assert update_document(text, "predictions", prediction_tables(committed())) == text


def test_a_measurement_stands_beside_its_prediction(tmp_path: Path) -> None:
    kernels = [("nvjet_tst_192x192", 12.5), ("_product_kernel", 7.25), ("_attention_kernel", 1.5),
               ("_gate_residual_layernorm_modulate_kernel", 2.0), ("_embed", 0.011)]  # fmt: skip
    row = {"section": "kernels", "case": "XL/2, batch 32", "contender": "lean bf16", "status": "ok",
           "shares": [{"part": name, "count": 1, "ms": ms, "share": 0.1} for name, ms in kernels],
           "ms": {"median": 23.261}}  # fmt: skip
    others = [row | {"case": "XL/2, batch 1"}, row | {"contender": "lean fp8"},
              {**row, "status": "failed", "shares": None}]  # fmt: skip
    step = {**row, "section": "step", "ms": {"median": 23.5}}
    report = {"machine": {"gpu": "NVIDIA H200"}, "rows": [*others, row, step]}
    columns, lines, note = prediction.table(64, report)
    cells = {line[0]: dict(zip(columns, line, strict=True))["measured, µs"] for line in lines}
    assert cells["sum: products"] == "19,750" and cells["sum: attention"] == "1,500"
    assert cells["sum: norms"] == "2,000" and cells["sum: the rest"] == "11.0"
    assert cells["sum: a step"] == "23,500" and cells["qkv"] == ""
    assert note.endswith("Measured on NVIDIA H200.")
    document = tmp_path / "kernels.md"
    document.write_text("<!-- predictions -->\n<!-- /predictions -->\n")
    assert main(["documents", "none", str(document), "--block", "predictions"]) == 0
    assert document.read_text().count("| sum: a step | 201 |") == 2
    report_file = tmp_path / "gpu.json"  # as a run writes it
    report_file.write_text(json.dumps(made_up.gpu()))
    assert main(["documents", str(report_file), str(document), "--block", "predictions"]) == 0
    ends = [line.split("| ")[-1] for line in document.read_text().splitlines() if "a step" in line]
    assert ends == ["40,000 |", "1,250 |"]
