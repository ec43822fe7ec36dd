"""TensorRT for RTX parses the graph of DiT-XL/2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch

from dit_engine.config import ModelConfig
from dit_engine.model import DiT
from dit_export.onnx.exporter import to_onnx
from dit_export.onnx.files import save
from dit_export.onnx.graphs import exportable, signature, transformer_graph
from dit_export.tensorrt.flavour import choose_flavour
from dit_export.tensorrt.network import check_supported, parse
from dit_export.tensorrt.reports import process_logger

pytest.importorskip("tensorrt_rtx")


def share_blocks(model: Any) -> None:
    """Every block of an onnx_ir Model with the weights of the first: 28 times less to write."""
    weights = model.graph.initializers
    for name, value in list(weights.items()):
        first = re.sub(r"^blocks\.\d+\.", "blocks.0.", name)
        if first != name:
            onnx_ir.convenience.replace_all_uses_with(value, weights[first])
            del weights[name]


@pytest.mark.slow
def test_xl_2_is_parsed(tmp_path: Path) -> None:
    config, dtype = ModelConfig.named("DiT-XL/2", 256), torch.float16
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in DiT(config).state_dict().items()}
        model = DiT(config)
    generator = torch.Generator().manual_seed(0)
    own = {
        name: torch.randn(shape, generator=generator).mul_(0.02).to(dtype)
        for name, shape in shapes.items()
        if not re.match(r"blocks\.[1-9]", name)
    }
    state = {name: own[re.sub(r"^blocks\.\d+\.", "blocks.0.", name)] for name in shapes}
    model.load_state_dict(state, assign=True)
    graph = transformer_graph("transformer", exportable(model, dtype), 3)
    made = to_onnx(graph, "transformer", *signature("transformer", config, None), 23)
    share_blocks(made)
    path = tmp_path / "transformer.onnx"
    save(made, path, 512)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("Attention") == config.depth
    flavour = choose_flavour("rtx")
    trt = flavour.load()
    logger = process_logger(trt)
    assert check_supported(flavour, path) == []
    builder = trt.Builder(logger)
    network, parser = parse(trt, builder, logger, path)
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    assert {i.name: tuple(i.shape) for i in inputs} == {
        "x": (-1, 4, 32, 32), "t": (-1,), "y": (-1,),
    }  # fmt: skip
    output = network.get_output(0)
    assert (output.name, tuple(output.shape)) == ("output", (-1, 8, 32, 32))
    assert network.num_layers > config.depth * 30
    del parser
    del network
