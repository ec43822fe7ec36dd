"""Exported graphs compute what the reference computes, and say what they are."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from exports import exported, manifest, random_vae, run
from numerics import assert_close_to_reference, relative_error
from tiny import NAMES, tiny_dit

from dit_bench.peers import openvino_core
from dit_engine import __version__
from dit_engine.sampling.coefficients import step_coefficients
from dit_engine.sampling.guidance import guided
from dit_engine.sampling.noise import GivenNoise, PerImageNoise
from dit_engine.sampling.samplers import SAMPLERS
from dit_engine.sampling.schedule import make_schedule
from dit_export.bundle import Bundle
from dit_export.onnx.export import ExportOptions, export_onnx
from dit_export.onnx.graphs import GuidedStep
from dit_export.onnx.verify import BOUNDS, upcast_file
from dit_export.source import weights_hash

pytestmark = pytest.mark.slow
X = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([0, 999, 500, 3, 750])
Y = torch.tensor([1, 10, 0, 9, 5])  # 10 is the null class


@pytest.fixture(scope="module")
def fp32() -> Bundle:
    return exported("fp32")


def exact(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tiny_dit().double()(x.double(), t, y)


@pytest.mark.parametrize("n", [1, 5])
def test_the_transformer_and_its_two_parts_are_the_model(fp32: Bundle, n: int) -> None:
    x, t, y = X[:n], T[:n], Y[:n]
    (whole,) = run(fp32, "transformer", x=x, t=t, y=y)
    (modulations,) = run(fp32, "conditioner", t=t, y=y)
    (hoisted,) = run(fp32, "denoiser", x=x, modulations=modulations)
    for output in (whole, hoisted):
        assert_close_to_reference(output, exact(x, t, y), tolerance=1e-5)


def test_vae_decoder_takes_every_size_and_undoes_the_normalisation(
    fp32: Bundle, tmp_path: Path
) -> None:
    scale = {"latents_mean": (1.0, -2.0, 0.0, 3.0), "latents_std": (0.5, 1.0, 2.0, 4.0)}
    vae = random_vae()
    vae.config = replace(vae.config, shift_factor=0.25, **scale)
    options = ExportOptions("fp32", graphs=("vae_decoder",))
    shifted = export_onnx(tiny_dit(), tmp_path / "out", options, vae=vae)
    assert shifted.vae == vae.config
    mean, std = (torch.tensor(values).double().view(1, 4, 1, 1) for values in scale.values())
    z = torch.randn(3, 4, 7, 9, generator=torch.Generator().manual_seed(2))
    for bundle, latents in (
        (fp32, z.double() / 0.18215),
        (shifted, z.double() * std / 0.18215 + mean + 0.25),
    ):
        (images,) = run(bundle, "vae_decoder", z=z)
        assert images.shape == (3, 3, 14, 18) and images.dtype == torch.float32
        with torch.inference_mode():
            expected = random_vae().double().decode(latents)
        assert_close_to_reference(images, expected, tolerance=1e-5)


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.7), ("dpm++", 0.0)])
def test_guided_step_in_a_loop_is_the_sampler(fp32: Bundle, sampler: str, eta: float) -> None:
    """The sampler itself runs on the float64 model; the graph is driven with tensors alone."""
    steps, n = 4, 3
    schedule = make_schedule(steps, SAMPLERS[sampler].spacing)
    scales = torch.tensor([4.0, 1.0, 2.5])  # the second is not guided
    noise = PerImageNoise([1, 2, 3], (4, 8, 8), torch.device("cpu"))
    start = noise.start()
    draws = torch.stack([noise(k) for k in range(steps)])
    model, labels = tiny_dit().double(), torch.tensor([1, 7, 3])
    both, times = torch.cat([labels, torch.full((n,), 10)]), torch.tensor(schedule.timesteps)

    def denoiser(x: torch.Tensor, k: int) -> torch.Tensor:
        return model(x, times[k].expand(len(x)), both[: len(x)])

    options = {"eta": eta} if sampler == "ddim" else {}
    given = GivenNoise(start.double(), draws.double(), noise)
    with torch.inference_mode():
        expected = SAMPLERS[sampler].function(
            guided(denoiser, scales), start.double(), schedule, given, **options
        )
    table = step_coefficients(sampler, schedule, learned=True, eta=eta).astype("float32")
    z, x0 = start, torch.zeros_like(start)
    for k in range(steps):
        z, x0 = run(
            fp32, "guided_step", z=z, x0_before=x0, noise=draws[k], t=times[k].expand(n).numpy(),
            y=labels, guidance_scale=scales, coefficients=torch.from_numpy(table[k]).expand(n, 9),
        )  # fmt: skip
    assert_close_to_reference(z, expected, tolerance=1e-4)


def test_rows_of_one_batch_may_be_at_different_steps(fp32: Bundle) -> None:
    schedule = make_schedule(6, "linspace")
    table = torch.from_numpy(step_coefficients("dpm++", schedule, learned=True)).float()
    rows = torch.tensor([0, 3, 5])
    inputs = {
        "z": X[:3], "x0_before": X[1:4],
        "noise": torch.full_like(X[2:5], math.nan),  # not read, because dpm++ adds none
        "t": torch.tensor(schedule.timesteps)[rows], "y": Y[2:5],
        "guidance_scale": torch.tensor([1.0, 4.0, 1.5]), "coefficients": table[rows],
    }  # fmt: skip
    together = run(fp32, "guided_step", **inputs)
    for i in range(3):
        alone = run(fp32, "guided_step", **{k: v[i : i + 1] for k, v in inputs.items()})
        for a, b in zip(together, alone, strict=True):
            assert relative_error(a[i : i + 1], b) < 1e-5


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_guided_channels_are_those_asked_for(channels: int) -> None:
    """x0 differs from the unguided one in exactly the guided channels, and at scale 1 nowhere."""
    model = tiny_dit()
    model.y_embedder.embedding_table.weight.data[10] = 1e30  # what is not guided does not read it
    coefficients = torch.tensor([1.0, -0.5, 1, 0, 0, 0, 0, 0, 0]).expand(5, 9)
    step, y = GuidedStep(model, channels), Y.clamp(max=9)
    with torch.inference_mode():
        plain = X - 0.5 * model(X, T, y)[:, :4]
        at_one, at_three = (
            step(X, X, X, T, y, torch.full((5,), s), coefficients)[1] for s in (1.0, 3.0)
        )
    torch.testing.assert_close(at_one, plain)
    differs = (at_three != at_one).flatten(2)
    assert torch.equal(differs.any(-1), differs.all(-1))
    assert differs.all(-1).all(0).tolist() == [c < channels for c in range(4)]


def test_fp16_for_tensorrt() -> None:
    """Within its tolerance, with a time embedding in float32. TensorRT takes Attention in fp16, and
    not in fp32, which a VAE is beside an fp16 DiT."""
    fp16 = exported("fp16", "transformer", "vae_decoder", target="tensorrt")
    (output,) = run(fp16, "transformer", x=X, t=T, y=Y)
    assert 1e-6 < relative_error(output, exact(X, T, Y)) < 5e-3
    for name, opset, attends in (("transformer", 23, True), ("vae_decoder", 20, False)):
        model = onnx.load(fp16.file(name))
        assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
        assert ("Attention" in {node.op_type for node in model.graph.node}) == attends
    graph = onnx.load(fp16.file("transformer")).graph
    types = {i.name: i.data_type for i in graph.initializer}
    assert types["blocks.0.attn.qkv.weight"] == onnx.TensorProto.FLOAT16
    for value in (*graph.input, *graph.output):
        expected = onnx.TensorProto.INT64 if value.name in "ty" else onnx.TensorProto.FLOAT
        assert value.type.tensor_type.elem_type == expected


def test_frequencies_of_the_time_step_are_torchs_to_the_bit(fp32: Bundle) -> None:
    """Another exp would be an ulp away in half of them: an angle is up to 999 times that off."""
    constants = onnx.load(fp32.file("conditioner")).graph.initializer
    (found,) = (onnx.numpy_helper.to_array(i) for i in constants if list(i.dims)[-1:] == [128])
    exponents = -math.log(10000.0) * torch.arange(128, dtype=torch.float32) / 128
    assert torch.equal(torch.from_numpy(found.copy()).flatten(), exponents.exp())


def test_names_can_be_read_and_nothing_is_said_of_the_exporting_machine(fp32: Bundle) -> None:
    for graph in fp32.graphs:
        content = fp32.file(graph).read_bytes()
        assert not any(word in content for word in (b"site-packages", b"stack_trace", b".py"))
    model = onnx.load(fp32.file("transformer"))
    assert {p.key: p.value for p in model.metadata_props} == {
        "graph": "transformer", "model": "DiT-2x48/2", "dtype": "fp32", "version": __version__,
        "checkpoint": weights_hash(tiny_dit()),
    }  # fmt: skip
    state = tiny_dit().state_dict()
    weights = {i.name: tuple(i.dims) for i in model.graph.initializer if i.name in state}
    assert weights.keys() == state.keys()
    assert weights["blocks.1.mlp.fc1.weight"] == (48, 192)  # as MatMul reads it
    names = Counter(node.name for node in model.graph.node)
    assert max(names.values()) == 1
    assert {"blocks.1.attn.qkv/MatMul", "blocks.0.attn/Attention", "t_embedder/Cos"} <= names.keys()
    for value in (*names, *(i.name for i in model.graph.initializer)):
        assert not re.search(r"val_|node_|_empty", value), value


def test_the_manifest_says_what_was_verified(fp32: Bundle) -> None:
    values = manifest(fp32)
    assert values["vae"]["block_out_channels"] == [32, 64] and values["guided_channels"] == 3
    assert fp32.label_names == NAMES
    for graph in fp32.graphs.values():
        assert graph.error is not None and 0 < graph.error["relative"] <= 1e-5
        assert [v.split()[0] for v in graph.verified_by] == ["onnx.checker", "onnxruntime"]
    assert [(t.name, t.dtype, t.shape) for t in fp32.graphs["guided_step"].inputs] == [
        ("z", "float32", ("batch", 4, 8, 8)), ("x0_before", "float32", ("batch", 4, 8, 8)),
        ("noise", "float32", ("batch", 4, 8, 8)), ("t", "int64", ("batch",)),
        ("y", "int64", ("batch",)), ("guidance_scale", "float32", ("batch",)),
        ("coefficients", "float32", ("batch", 9)),
    ]  # fmt: skip


def test_weights_above_the_limit_have_a_file_of_their_own(fp32: Bundle) -> None:
    bundle = exported("fp32", "conditioner", external_data_mib=0)
    data = bundle.path / "conditioner.onnx.data"
    assert data.stat().st_size > 150_000 > 20_000 > bundle.file("conditioner").stat().st_size
    (outside,), (inside,) = (run(b, "conditioner", t=T, y=Y) for b in (bundle, fp32))
    assert torch.equal(outside, inside)


def test_bf16_graphs_hold_the_model_rounded_to_bf16(tmp_path: Path) -> None:
    """The graphs' own nodes and weights, computed in float32: no rounding hides an error there."""
    bf16 = exported("bf16", "transformer", "vae_decoder")
    assert [path.name for path in bf16.path.iterdir() if path.is_dir()] == []
    z = torch.randn(2, 4, 7, 5, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        output = tiny_dit().bfloat16().double()(X.double(), T, Y)
        images = random_vae().bfloat16().double().decode(z.double() / 0.18215)
    for name, inputs, expected in (
        ("transformer", {"x": X, "t": T, "y": Y}, output),
        ("vae_decoder", {"z": z}, images),
    ):
        error = bf16.graphs[name].error
        assert bf16.graphs[name].verified_by[1].endswith(" in float32")
        assert error is not None and 1e-5 < error["relative"] <= 5e-2
        path = tmp_path / f"{name}.onnx"
        upcast_file(bf16.file(name), path)
        for file, has in ((bf16.file(name), True), (path, False)):
            types = {i.data_type for i in onnx.load(file).graph.initializer}
            assert (onnx.TensorProto.BFLOAT16 in types) == has
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (actual,) = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        assert_close_to_reference(torch.from_numpy(actual), expected, tolerance=1e-5)


@pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO runs bf16: extra peers")
@pytest.mark.parametrize("name", ["transformer", "vae_decoder"])
def test_bf16_graphs_are_right_in_bf16(name: str) -> None:
    """An export is checked in float32, where an angle that is computed in bf16 does not show."""
    bundle = exported("bf16", "transformer", "vae_decoder")
    with torch.inference_mode():
        decoded = random_vae().double().decode(X.double() / 0.18215)
    inputs, expected = {
        "transformer": ({"x": X, "t": T, "y": Y}, exact(X, T, Y)),
        "vae_decoder": ({"z": X}, decoded),
    }[name]
    # Unless told, OpenVINO would compute the parts that are in float32 in bf16, too.
    hint = {"EXECUTION_MODE_HINT": "ACCURACY"}
    compiled = openvino_core().compile_model(str(bundle.file(name)), "CPU", hint)
    (actual,) = compiled({key: value.numpy() for key, value in inputs.items()}).values()
    assert 1e-3 < relative_error(actual, expected) <= BOUNDS["bf16"]
