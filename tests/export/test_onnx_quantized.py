"""int8 and fp8 exports: the pairs are where they should be, and the values are the codes'."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from exports import manifest, quantized, random_dit, run
from numerics import relative_error

from dit_export.bundle import Bundle, ExportFailed
from dit_export.onnx.calibration import calibrate
from dit_export.onnx.exporter import to_onnx
from dit_export.onnx.graphs import Conditioner, exportable, signature, transformer_graph
from dit_export.onnx.qdq import QuantizedLinear, quantize, rounded

LAYERS = [f"blocks.{i}.{name}" for i in range(2)
          for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]  # fmt: skip
X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
T, Y = torch.tensor([20, 500, 960]), torch.tensor([1, 10, 4])


@pytest.fixture(params=[("int8", "onnxruntime"), ("int8", "tensorrt"), ("fp8", "tensorrt")])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return quantized(*request.param)


def test_every_linear_layer_of_a_block_and_nothing_else_is_quantised(bundle: Bundle) -> None:
    graph = onnx.load(bundle.file("denoiser")).graph
    made = {output: node for node in graph.node for output in node.output}
    constants = {i.name: i for i in graph.initializer}
    pairs = []
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in made:
            weight, value = made[node.input[1]], made[node.input[0]]
            if weight.op_type != "DequantizeLinear":
                continue
            assert value.op_type == "DequantizeLinear"
            assert made[value.input[0]].op_type == "QuantizeLinear"
            assert made[value.input[0]].input[1] == value.input[1]  # one scale for both
            assert constants[value.input[1]].dims == []
            out = constants[weight.input[0]].dims[1]
            assert constants[weight.input[1]].dims == [out]
            assert [a.i for a in weight.attribute if a.name == "axis"] == [1]
            pairs.append(node.name.removesuffix("/MatMul"))
    assert sorted(pairs) == sorted(LAYERS)
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") == 8 and kinds.count("DequantizeLinear") == 16
    assert not any(f"{layer}.weight" in constants for layer in LAYERS)


def test_codes_times_scales_are_the_weights(bundle: Bundle) -> None:
    constants = {
        i.name: onnx.numpy_helper.to_array(i).astype(np.float64)
        for i in onnx.load(bundle.file("denoiser")).graph.initializer
    }
    # Half a step, in units of the scale (E4M3's step below 448 is 32), and a scale's own rounding.
    tolerance = 0.6 if bundle.dtype == "int8" else 16.5
    for layer in LAYERS:
        weight = random_dit().get_submodule(layer).weight.detach().double().t().numpy()
        scale = constants[f"{layer}.weight_scale"]
        rebuilt = constants[f"{layer}.weight_codes"] * scale
        assert (np.abs(rebuilt - weight) <= tolerance * scale).all()  # (in, out)
        largest = np.abs(constants[f"{layer}.weight_codes"]).max(0)
        assert (largest == (127 if bundle.dtype == "int8" else 448)).all()  # every channel's own
        assert (constants[f"{layer}.weight_zero_point"] == 0).all()
        zero_point = constants[f"{layer}.input_zero_point"]
        assert zero_point == (128 if bundle.target == "onnxruntime" else 0)


def test_the_graph_is_near_the_model_and_says_how_near(bundle: Bundle) -> None:
    model = random_dit()
    with torch.inference_mode():
        modulations = Conditioner(model)(T, Y)
        expected = model.double()(X.double(), T, Y)
    (output,) = run(bundle, "denoiser", x=X, modulations=modulations)
    assert 1e-4 < relative_error(output, expected) < 0.1
    graph = bundle.graphs["denoiser"]
    assert graph.error is not None and graph.error["relative"] <= graph.error["bound"] == 5e-2
    assert graph.accuracy is not None and 1e-4 < graph.accuracy["rms"] < 0.1
    record = manifest(bundle)["quantization"]
    assert 1e-4 < record["latents"]["rms"] < 0.5
    assert record["calibration"] == {"images": 2, "steps": 3, "sampler": "dpm++"}
    assert sorted(record["input_ranges"]) == sorted(LAYERS)


def test_ranges_are_the_largest_that_sampling_meets() -> None:
    """Against a count of our own, of one layer, in a model whose inputs are all alike."""
    model = random_dit()
    seen: list[float] = []
    hook = model.blocks[1].mlp.fc2.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].abs().max().item())
    )
    ranges = calibrate(model, images=2, steps=3)
    hook.remove()
    assert len(seen) == 3 and ranges["blocks.1.mlp.fc2"] == max(seen)
    assert len(ranges) == 8 and not any(m._forward_pre_hooks for m in model.modules())


def test_a_model_that_overflows_cannot_be_calibrated() -> None:
    model = random_dit()
    model.blocks[0].mlp.fc1.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"^calibration: the input of blocks\.0\..* reaches nan$"):
        calibrate(model, images=1, steps=2)


def test_nan_of_a_later_step_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_export.onnx import calibration

    def twice(model: torch.nn.Module, *_: object) -> None:
        layer = model.blocks[0].attn.qkv
        layer(torch.ones(1, 1, layer.in_features))
        layer(torch.full((1, 1, layer.in_features), float("nan")))
        layer(torch.ones(1, 1, layer.in_features))

    monkeypatch.setattr(calibration, "trajectory", twice)
    with pytest.raises(ValueError, match=r"the input of blocks\.0\.attn\.qkv reaches nan$"):
        calibrate(random_dit(), images=1, steps=2)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rounding_clips_and_takes_the_nearest(kind: str) -> None:
    x = torch.tensor([-1000.0, -3.4, 0.0, 0.6, 17.1, 1000.0])
    expected = [-127, -3, 0, 1, 17, 127] if kind == "int8" else [-448, -3.5, 0, 0.625, 17, 448]
    if kind == "fp8":
        expected[4] = 18 if abs(18 - 17.1) < abs(16 - 17.1) else 16  # steps of 2 from 16 on
    assert rounded(x, kind).float().tolist() == expected


def test_quantised_linear_is_products_of_whole_numbers() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 5)
    x = torch.randn(2, 3, 6)
    made = QuantizedLinear(linear, "int8", x.abs().max().item(), torch.float32)
    w = linear.weight.detach().double()
    steps = w.abs().amax(1) / 127  # (out,)
    step = x.abs().max().double() / 127
    codes = (x.double() / step).round() @ (w / steps[:, None]).round().t()
    expected = codes * steps * step + linear.bias.double()
    with torch.no_grad():
        assert relative_error(made(x), expected) < 1e-5


@pytest.mark.parametrize(
    ("node", "count", "missing"),
    [("blocks.1.mlp.fc2/MatMul", 7, "blocks.1.mlp.fc2"), ("blocks.0.attn.qkv/MatMul", 7,
                                                          "blocks.0.attn.qkv")],
)  # fmt: skip
def test_a_layer_that_is_not_found_is_no_quantised_export(
    node: str, count: int, missing: str
) -> None:
    """torch's exporter could name a product otherwise one day, or write it as another operator."""
    model = to_onnx(
        transformer_graph("denoiser", exportable(random_dit(), torch.float32), 3),
        "denoiser", *signature("denoiser", random_dit().config, None), 23,
    )  # fmt: skip
    (product,) = (n for n in model.graph if n.name == node)
    product.name = "node_MatMul_7"
    with pytest.raises(
        ExportFailed,
        match=rf": {count} linear layers were found .*, where the 2 blocks have 8; {missing} is",
    ):
        quantize(model, "int8", dict.fromkeys(LAYERS, 1.0), torch.float32, unsigned=True)
