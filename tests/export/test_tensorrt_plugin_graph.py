"""The plugin's place in an ONNX graph: five standard nodes become one that computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


def denoiser(**overrides: Any) -> tuple[Any, Any]:
    """(a DiT in float32, its denoiser as an onnx ModelProto)."""
    pytest.importorskip("onnxscript")
    import onnx
    from onnx import ModelProto
    from tiny import tiny_dit

    from dit_export.onnx.exporter import to_onnx
    from dit_export.onnx.graphs import Denoiser, signature

    model = tiny_dit(depth=1, **overrides)
    specs = signature("denoiser", model.config, None)
    import onnx_ir

    exported = to_onnx(Denoiser(model), "denoiser", *specs, 20)
    proto = onnx_ir.serde.serialize_model(exported)
    assert isinstance(proto, ModelProto)
    onnx.checker.check_model(proto)
    return model, proto


def evaluate(proto: Any, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """By onnx's own evaluator, with the plugin's node as dit_kernels' reference."""
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    from dit_kernels import reference

    class layernorm_modulate(OpRun):
        op_domain = "dit"

        def _run(self, x, shift, scale, **_):
            tensors = (torch.from_numpy(np.array(a)) for a in (x, shift, scale))
            return (reference.layernorm_modulate(*tensors, 1e-6).numpy(),)

    (output,) = ReferenceEvaluator(proto, new_ops=[layernorm_modulate]).run(None, feeds)
    return np.asarray(output)


def test_fused_graph_computes_the_same():
    from dit_export.onnx.graphs import modulation_width
    from dit_export.tensorrt.plugin_graph import fuse

    model, proto = denoiser()
    rng = np.random.default_rng(0)
    feeds = {
        "x": rng.standard_normal((2, 4, 8, 8), np.float32),
        "modulations": rng.standard_normal((2, modulation_width(model.config)), np.float32) * 0.2,
    }
    before, nodes = evaluate(proto, feeds), len(proto.graph.node)
    assert fuse(proto) == 3  # two in the block, one in the final layer
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("layernorm_modulate") == 3 and "LayerNormalization" not in kinds
    assert len(kinds) < nodes - 3 * 4
    named = [n.name for n in proto.graph.node if n.op_type == "layernorm_modulate"]
    assert named[0] == "blocks.0.norm1/layernorm_modulate"
    np.testing.assert_allclose(evaluate(proto, feeds), before, rtol=1e-4, atol=1e-5)


def test_another_epsilon_is_left_alone():
    from dit_export.tensorrt.plugin_graph import fuse

    _, proto = denoiser(mlp_norm_eps=1e-5)
    assert fuse(proto) == 2
    assert [n.op_type for n in proto.graph.node].count("LayerNormalization") == 1
