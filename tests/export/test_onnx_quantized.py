"""int8 and fp8 exports: the pairs are where they should be, and the values are the codes'."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from exports import manifest, quantized, run
from numerics import relative_error
from tiny import tiny_dit

from dit_export.bundle import Bundle, ExportFailed
from dit_export.onnx import quantization
from dit_export.onnx.graphs import Conditioner
from dit_export.onnx.quantization import calibrate, check_pairs, rounded

LAYERS = [f"blocks.{i}.{name}" for i in range(2)
          for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]  # fmt: skip


@pytest.fixture(params=[("int8", "onnxruntime"), ("int8", "tensorrt"), ("fp8", "tensorrt")])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return quantized(*request.param)


@pytest.mark.slow
def test_each_linear_layer_of_a_block_and_nothing_else_is_quantised(bundle: Bundle) -> None:
    """Every product's weight is codes times scales per channel; its input has one scale."""
    graph = onnx.load(bundle.file("denoiser")).graph
    made = {output: node for node in graph.node for output in node.output}
    constants = {
        i.name: onnx.numpy_helper.to_array(i).astype(np.float64) for i in graph.initializer
    }
    largest = 127 if bundle.dtype == "int8" else 448
    # Half a step, in units of the scale (E4M3's step below 448 is 32), and a scale's own rounding.
    tolerance = 0.6 if bundle.dtype == "int8" else 16.5
    layers = []
    for node in graph.node:
        weight = made.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or weight.op_type != "DequantizeLinear":
            continue
        value = made[node.input[0]]
        assert value.op_type == "DequantizeLinear"
        assert made[value.input[0]].op_type == "QuantizeLinear"
        assert list(made[value.input[0]].input[1:]) == list(value.input[1:])  # one scale for both
        assert constants[value.input[1]].shape == ()
        assert constants[value.input[2]] == (128 if bundle.target == "onnxruntime" else 0)
        layers.append(node.name.removesuffix("/MatMul"))
        exact = tiny_dit().get_submodule(layers[-1]).weight.detach().double().t().numpy()
        codes, scale, zero_point = (constants[name] for name in weight.input)
        assert codes.shape == exact.shape and scale.shape == zero_point.shape == exact.shape[1:]
        assert [a.i for a in weight.attribute if a.name == "axis"] == [1]
        assert (np.abs(codes * scale - exact) <= tolerance * scale).all()
        assert (np.abs(codes).max(0) == largest).all() and (zero_point == 0).all()
        assert f"{layers[-1]}.weight" not in constants
    assert sorted(layers) == sorted(LAYERS)
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") == 8 and kinds.count("DequantizeLinear") == 16


@pytest.mark.slow
def test_the_graph_is_near_the_model_and_says_how_near(bundle: Bundle) -> None:
    model = tiny_dit()
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    t, y = torch.tensor([20, 500, 960]), torch.tensor([1, 10, 4])
    with torch.inference_mode():
        modulations = Conditioner(model)(t, y)
        expected = model.double()(x.double(), t, y)
    (output,) = run(bundle, "denoiser", x=x, modulations=modulations)
    assert 1e-4 < relative_error(output, expected) < 0.1
    error = bundle.graphs["denoiser"].error
    assert error is not None and error["relative"] <= error["bound"] == 5e-2
    record = manifest(bundle)["quantization"]
    assert 1e-4 < record["latents"]["rms"] < 0.5
    assert sorted(record["input_ranges"]) == sorted(LAYERS)


def test_ranges_are_the_largest_that_sampling_meets() -> None:
    """Compared with a count of the test's own for one layer."""
    model = tiny_dit()
    seen: list[float] = []
    hook = model.blocks[1].mlp.fc2.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].abs().max().item())
    )
    ranges = calibrate(model, images=2, steps=3)
    hook.remove()
    assert len(seen) == 3 and ranges["blocks.1.mlp.fc2"] == max(seen)
    assert len(ranges) == 8 and not any(m._forward_pre_hooks for m in model.modules())
    assert len(calibrate(tiny_dit(has_null_class=False), images=1, steps=2)) == 8  # unguided


def test_activations_that_are_not_finite_cannot_be_calibrated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nan_between(model: torch.nn.Module, *_: object) -> None:
        layer = model.blocks[0].attn.qkv
        for value in (1.0, float("nan"), 1.0):  # a later finite step must not hide the NaN
            layer(torch.full((1, 1, layer.in_features), value))

    monkeypatch.setattr(quantization, "trajectory", nan_between)
    with pytest.raises(ValueError, match=r"the input of blocks\.0\.attn\.qkv reaches nan$"):
        calibrate(tiny_dit(), images=1, steps=2)


@pytest.mark.parametrize(
    ("kind", "expected"),
    # E4M3 has steps of 0.125 below 1, of 0.5 below 4 and of 2 from 16 on: 17.1 is nearer to 18.
    [("int8", [-127, -3, 0, 1, 17, 127]), ("fp8", [-448, -3.5, 0, 0.625, 18, 448])],
)
def test_rounding_clips_and_takes_the_nearest(kind: str, expected: list[float]) -> None:
    x = torch.tensor([-1000.0, -3.4, 0.0, 0.6, 17.1, 1000.0])
    assert rounded(x, kind).float().tolist() == expected


def test_a_graph_without_all_its_pairs_is_no_quantised_export() -> None:
    """An optimiser could fold the codes and scales of a weight into one constant."""
    nodes = [SimpleNamespace(op_type="DequantizeLinear")] * 16
    check_pairs(SimpleNamespace(graph=nodes), "denoiser", 8)
    with pytest.raises(ExportFailed, match=r"^denoiser: 15 .* two for each of the 8 linear layers"):
        check_pairs(SimpleNamespace(graph=nodes[1:]), "denoiser", 8)
