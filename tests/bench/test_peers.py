"""Peers on small models: each computes our function, and what does not is never timed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_bench.cpu_forward import Forward, forward_peers, random_model
from dit_bench.cpu_vae import Decode, diffusers_autoencoder
from dit_bench.peers import (
    BF16_TIMES_EAGER,
    FP32_BOUND,
    Peer,
    build_peers,
    diffusers_state,
    relative_error,
)
from dit_engine.config import ModelConfig
from dit_engine.vae import VAEConfig

CONFIG = ModelConfig(
    depth=2, hidden_size=48, num_heads=2, patch_size=2, input_size=8, num_classes=10,
    numerics="diffusers",
)  # fmt: skip
SMALL_VAE = VAEConfig(block_out_channels=(32, 64), layers_per_block=1)

needs_diffusers = pytest.mark.skipif(find_spec("diffusers") is None, reason="no diffusers")
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="no openvino")


@pytest.fixture
def forward() -> Forward:
    return Forward(random_model(CONFIG), batch=4, threads=1)


@pytest.fixture
def decode() -> Decode:
    return Decode(SMALL_VAE, side=8, batch=1, threads=1)


def checked(peers: list[Peer], workload: Any) -> dict[str, dict[str, Any]]:
    expected = workload.expected()
    built = build_peers(peers, expected, workload.bf16_error(expected), lambda _: None)
    assert list(built.functions) == [peer.name for peer in peers], built.records
    return built.records


def test_a_wrong_time_step_or_label_shows_above_the_bound(forward: Forward) -> None:
    assert all(bool((p != 0).any()) for p in forward.model.parameters())
    expected = forward.expected()
    bound = BF16_TIMES_EAGER * forward.bf16_error(expected)
    wrong_row = torch.cat([forward.labels[:3], forward.labels[:1]])
    with torch.inference_mode():
        for t, labels in ((forward.t + 1, forward.labels), (forward.t, wrong_row)):
            assert relative_error(forward.model(forward.x, t, labels), expected) > 3 * bound


def test_half_of_the_rows_are_unlabelled_and_all_is_repeatable(forward: Forward) -> None:
    assert torch.equal(forward.labels[2:], torch.full((2,), CONFIG.null_class))
    again = Forward(random_model(CONFIG), batch=4, threads=1)
    assert torch.equal(forward.expected(), again.expected())


@needs_diffusers
def test_diffusers_transformer_is_our_model(forward: Forward) -> None:
    fp32 = Peer("diffusers fp32", "fp32", lambda: forward.diffusers(torch.float32))
    bf16 = Peer("diffusers bf16", "bf16", lambda: forward.diffusers(torch.bfloat16))
    records = checked([fp32, bf16], forward)
    assert records["diffusers fp32"]["error"] < 1e-5
    assert records["diffusers bf16"]["error"] > 1e-4  # and it did run in bf16


@needs_diffusers
def test_diffusers_shares_our_weights(forward: Forward) -> None:
    state = forward.model.state_dict()
    theirs = diffusers_state(state, CONFIG.depth)
    ours = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert all(tensor.untyped_storage().data_ptr() in ours for tensor in theirs.values())
    key = theirs["transformer_blocks.1.attn1.to_k.weight"]
    assert torch.equal(key, state["blocks.1.attn.qkv.weight"][48:96])


@needs_diffusers
def test_diffusers_autoencoder_is_our_vae(decode: Decode) -> None:
    theirs = diffusers_autoencoder(decode.vae)
    with torch.inference_mode():
        assert relative_error(theirs.decode(decode.z).sample, decode.expected()) < 1e-5
    checked([Peer("diffusers bf16", "bf16", decode.diffusers)], decode)


@needs_openvino
def test_openvino_computes_our_function(forward: Forward, decode: Decode) -> None:
    fp32 = Peer("openvino fp32", "fp32", lambda: forward.openvino("fp32"))
    bf16 = Peer("openvino bf16", "bf16", lambda: forward.openvino("bf16"))
    records = checked([fp32, bf16], forward)
    assert records["openvino fp32"]["error"] < 1e-5
    assert relative_error(decode.openvino()(), decode.expected()) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "frozen default"])
def test_compiled_model_computes_our_function(forward: Forward, mode: str) -> None:
    checked([Peer("compile bf16", "bf16", lambda: forward.compiled(mode))], forward)


def test_eager_peers_are_in_bf16(forward: Forward, decode: Decode) -> None:
    for workload in (forward, decode):
        expected = workload.expected()
        record = checked([Peer("eager bf16", "bf16", workload.eager)], workload)["eager bf16"]
        assert record["error"] == workload.bf16_error(expected) > 1e-4
        assert record["bound"] == BF16_TIMES_EAGER * record["error"]


def test_every_forward_peer_is_named_once(forward: Forward) -> None:
    names = [peer.name for peer in forward_peers(forward, ("default", "max-autotune"))]
    assert len(names) == len(set(names))
    assert {"openvino bf16", "compile bf16 default", "diffusers fp32", "lean int8"} <= set(names)


EXPECTED = torch.tensor([3.0, 4.0])


def fails(error: Exception) -> Any:
    def build() -> Any:
        raise error

    return build


@pytest.mark.parametrize(
    ("precision", "output", "timed"),
    [
        ("fp32", EXPECTED + 2e-4, True),  # relative error 5.7e-5
        ("fp32", EXPECTED + 6e-4, False),
        ("bf16", EXPECTED * 1.03, True),  # bf16 eager is off by 0.01
        ("bf16", EXPECTED * 1.05, False),
        ("int8", EXPECTED * 1.09, True),
        ("int8", EXPECTED * 1.11, False),
        ("fp32", EXPECTED * torch.nan, False),
        (None, torch.zeros(3), True),
    ],
)
def test_a_wrong_result_is_not_timed(precision: str | None, output: Tensor, timed: bool) -> None:
    said: list[str] = []
    peer = Peer("peer", precision, lambda: lambda: output)
    built = build_peers([peer], EXPECTED, 0.01, said.append)
    assert ("peer" in built.functions) is timed
    assert (built.reason("peer") is None) is timed
    if not timed:
        assert "computes another function" in str(built.reason("peer"))
        assert len(said) == 1 and "not timed" in said[0]


@pytest.mark.parametrize(
    "error",
    [ImportError("No module named 'other'"), ValueError("bad"), RuntimeError("two\nlines")],
    ids=lambda error: type(error).__name__,
)
def test_what_cannot_run_is_skipped_and_named(error: Exception) -> None:
    said: list[str] = []
    good = Peer("good", "fp32", lambda: lambda: EXPECTED)
    built = build_peers([Peer("other", "fp32", fails(error)), good], EXPECTED, 0.01, said.append)
    assert list(built.functions) == ["good"]
    assert built.reason("other") == " ".join(str(error).split())
    assert said[0] == f"  other: skipped: {built.reason('other')}"


def test_a_fault_of_our_own_is_not_a_skipped_peer() -> None:
    with pytest.raises(AttributeError):
        build_peers([Peer("p", "fp32", fails(AttributeError("x")))], EXPECTED, 0.01, print)


def test_the_smallest_bf16_bound_is_that_of_float32() -> None:
    peer = Peer("p", "bf16", lambda: lambda: EXPECTED)
    assert build_peers([peer], EXPECTED, 0.0, lambda _: None).records["p"]["bound"] == FP32_BOUND


def test_relative_error_is_of_norms() -> None:
    assert relative_error(torch.tensor([3.0, 5.0]), EXPECTED) == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"shapes \(1, 2\) and \(2,\) differ"):
        relative_error(EXPECTED[None], EXPECTED)


@pytest.mark.parametrize("batch", [0, 1, 3, -2])
def test_batches_are_even(batch: int) -> None:
    with pytest.raises(ValueError, match=f"batch {batch} is not a positive even number"):
        Forward(SimpleNamespace(config=CONFIG), batch, 1)


def test_official_numerics_are_refused() -> None:
    official = ModelConfig(**{**CONFIG.to_dict(), "numerics": "official"})
    with pytest.raises(ValueError, match="numerics 'official': diffusers computes only"):
        Forward(SimpleNamespace(config=official), 2, 1)


AFTER_OPENVINO = """
import faulthandler, os, signal, torch
from torch import nn
from dit_bench.peers import openvino_function

faulthandler.enable()  # as pytest does: signals then have a stack of their own
model = nn.Linear(8, 8).eval()
first, second = (openvino_function(model, (torch.randn(2, 8),), "fp32", 1) for _ in range(2))
first(), second()
del first
del second
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("heard")
"""


@pytest.mark.slow
def test_ctrl_c_is_heard_after_openvino() -> None:
    """OpenVINO's plugins replace the stack for signals, and may leave one that is no more."""
    pytest.importorskip("openvino")
    done = subprocess.run([sys.executable, "-c", AFTER_OPENVINO], capture_output=True, text=True,
                          timeout=120)  # fmt: skip
    assert done.returncode == 0 and "heard" in done.stdout, done.stderr[-2000:]
