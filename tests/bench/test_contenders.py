"""Contenders on small models: each computes our function, and what does not is never timed."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from tiny import NAMES, tiny_dit, tiny_engine
from torch import Tensor

from dit_bench import peers
from dit_bench.contenders import (
    BF16_TIMES_EAGER,
    Contender,
    allowed_error,
    build,
    parse_peers,
    relative_error,
)
from dit_bench.speed.forward import CHANNELS, SCALE, STEP, Networks, Work
from dit_bench.subjects import in_numerics, load_subject, random_model, random_vae
from dit_bench.timing import Budget
from dit_engine.config import ModelConfig
from dit_engine.engine import Engine
from dit_engine.errors import BackendUnavailable
from dit_engine.model import DiT
from dit_engine.sampling.guidance import guided
from dit_engine.vae import VAEConfig

CONFIG = ModelConfig(
    depth=2, hidden_size=48, num_heads=2, patch_size=2, input_size=8, num_classes=10,
    numerics="diffusers",
)  # fmt: skip
LIBRARIES = [
    pytest.param(name, marks=[*more, pytest.mark.skipif(find_spec(name) is None, reason="missing")])
    for name, more in (("diffusers", ()), ("openvino", [pytest.mark.slow]))
]
EXPECTED = torch.tensor([3.0, 4.0])


@pytest.fixture(scope="module")
def work() -> Work:
    vae = random_vae(VAEConfig(block_out_channels=(32, 64), layers_per_block=1))
    return Work(Networks(Engine(random_model(CONFIG), vae, device="cpu")), 4)


@torch.inference_mode()
def test_a_wrong_time_step_or_label_shows_above_the_bound(work: Work) -> None:
    model = work.engine.model
    assert all(bool((p != 0).any()) for p in model.parameters())
    assert torch.equal(work.labels[2:], torch.full((2,), CONFIG.null_class))  # as under guidance
    expected = work.forward("eager", "fp32")()
    assert torch.equal(expected, model(work.x, work.t, work.labels))
    bound = BF16_TIMES_EAGER * relative_error(work.forward("eager", "bf16")(), expected)
    wrong_row = torch.cat([work.labels[:3], work.labels[:1]])
    for t, labels in ((work.t + 1, work.labels), (work.t, wrong_row)):
        assert relative_error(model(work.x, t, labels), expected) > 3 * bound


@torch.inference_mode()
@pytest.mark.parametrize("name", ["lean", *LIBRARIES])
def test_everyone_computes_the_forward_and_the_decode(name: str, work: Work) -> None:
    for function in (work.forward, work.decode):
        expected = function("eager", "fp32")()
        if name != "openvino":  # whose conversions take seconds
            assert relative_error(function(name, "fp32")(), expected) < 1e-5
        error = relative_error(function(name, "bf16")(), expected)
        plain = relative_error(function("eager", "bf16")(), expected)
        assert 1e-4 < error <= BF16_TIMES_EAGER * plain  # and it did run in bf16


@torch.inference_mode()
@pytest.mark.parametrize("form", ["autotuned blocks graph", "compile frozen"])
def test_compiled_models_compute_the_forward(
    form: str, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what is traced, without Inductor's half of a minute."""
    from torch._inductor import config

    frozen: list[bool] = []
    compiler = torch.compile

    def traced(graph: torch.fx.GraphModule, inputs: object, mode: str = "") -> object:
        assert mode == ("" if form == "compile frozen" else "max-autotune-no-cudagraphs")
        frozen.append(config.freezing)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend=traced, **how))
    monkeypatch.setattr(peers, "graphed", lambda forward, _: forward)
    expected = work.forward("eager", "fp32")()
    error = relative_error(work.forward(form, "bf16")(), expected)
    assert error <= allowed_error("bf16", relative_error(work.forward("eager", "bf16")(), expected))
    assert frozen == [form == "compile frozen"]  # and one compilation serves both blocks
    assert all("forward" not in vars(block) for block in work.engine.model.blocks)


@torch.inference_mode()
def test_a_guided_step_is_ddpms_mean(work: Work) -> None:
    """Against the formula, by hand: guidance on three channels, then the posterior's mean."""
    config, model, schedule = work.engine.config, work.engine.model, work.schedule
    labels = torch.cat([work.classes, torch.full_like(work.classes, config.null_class)])

    def denoiser(x: Tensor, k: int) -> Tensor:
        return model(x, work.timesteps[STEP].expand(len(x)), labels)

    eps = guided(denoiser, torch.full((4,), SCALE), CHANNELS)(work.x, 0)[:, :4].double()
    z, a = work.x.double(), schedule.alphas_cumprod[STEP]
    x0 = (z - (1 - a) ** 0.5 * eps) / a**0.5
    expected = schedule.posterior_mean_coef1[STEP] * x0 + schedule.posterior_mean_coef2[STEP] * z
    for name in ("eager", "lean"):
        assert relative_error(work.guided_step(name, "fp32")(), expected) < 1e-5


def test_a_wrong_result_is_not_timed() -> None:
    """bf16 eager is off by 0.01 here, which twice over is the bound of bf16."""
    bounds = {"fp32": 1e-4, "bf16": 0.02, "fp16": 0.0025, "int8": 0.08, "fp8": 0.08}
    for precision, bound in bounds.items():
        for factor in (1 + 0.9 * bound, 1 + 1.1 * bound, torch.nan):
            one = Contender("one", "peer", precision, lambda f=factor: lambda: EXPECTED * f)
            built = build([one], EXPECTED, 0.01, lambda _: None)
            timed = factor == 1 + 0.9 * bound
            assert ("one" in built.functions) is timed is ("reason" not in built.records["one"])
    assert allowed_error("bf16", 0.0) == allowed_error("fp16", 0.0) == 1e-4
    assert (allowed_error("int8", 1.0), allowed_error("fp8", 1.0)) == (0.1, 0.25)
    many = torch.ones(64, 9)
    one_wrong = torch.cat([torch.zeros(1, 9), many[1:]])  # 0.125 of the whole
    assert relative_error(one_wrong, many) == 1.0
    assert math.isnan(relative_error(torch.cat([many[:1] * torch.nan, many[1:]]), many))
    part = Contender("one", "part", "fp32", lambda: lambda: torch.zeros(3))  # is not compared
    assert "one" in build([part], EXPECTED, 0.01, lambda _: None).functions


def test_what_cannot_run_is_skipped_and_named_and_a_subject_that_breaks_has_failed() -> None:
    """Others are measured all the same: Triton's errors, say, are of no common class."""

    def raising(error: Exception, role: str) -> Contender:
        def fail() -> Any:
            raise error

        return Contender("other", role, "fp32", fail)

    good = Contender("good", "peer", "fp32", lambda: lambda: EXPECTED)
    for error, broken in (
        (ImportError("No module named 'x'"), False), (MemoryError("two\nlines"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False), (BackendUnavailable("x"), False),
        (RuntimeError("a kernel died"), True), (AttributeError("x"), True),
    ):  # fmt: skip
        for role in ("peer", "subject"):
            said: list[str] = []
            built = build([raising(error, role), good], EXPECTED, 0.01, said.append)
            assert list(built.functions) == ["good"]
            found = built.records["other"]
            assert found["status"] == ("failed" if broken and role == "subject" else "skipped")
            assert " ".join(str(error).split()) in found["reason"]
            assert said[0] == f"  other: {found['status']}: {found['reason']}"
    shape = Contender("other", "subject", "fp32", lambda: lambda: torch.zeros(3))
    assert build([shape], EXPECTED, 0.01, lambda _: None).records["other"]["status"] == "wrong"


def test_a_compilation_is_not_begun_without_time_for_it() -> None:
    now, begun = [0.0], list[str]()

    def contender(name: str, seconds: float, takes: float) -> Contender:
        def make() -> Any:
            begun.append(name)
            now[0] += takes
            return lambda: EXPECTED

        return Contender(name, "peer", "fp32", make, seconds=seconds)

    found = [contender("a", 0, 15), contender("b", 90, 90), contender("c", 0, 90),
             contender("d", 0, 1)]  # fmt: skip
    budget = Budget(100, clock=lambda: now[0])
    built = build(found, EXPECTED, 0.01, lambda _: None, budget=budget)
    assert begun == list(built.functions) == ["a", "c"]
    late = {"status": "skipped", "reason": "no time was left"}
    assert built.records["b"] == built.records["d"] == late


def test_diffusers_refuses_what_it_does_not_compute() -> None:
    with pytest.raises(ValueError, match="numerics 'official': diffusers computes only"):
        Work(Networks(tiny_engine(vae=False)), 1).forward("diffusers", "fp32")


def test_peers_have_the_precision_of_activations() -> None:
    found = parse_peers("diffusers, eager/fp32,trt,diffusers", "int8")
    assert found == [("diffusers", "bf16"), ("eager", "fp32"), ("tensorrt", "bf16")]


@torch.inference_mode()
def test_a_size_has_random_weights_and_a_checkpoint_its_own(model: str) -> None:
    """A twin in other numerics shares them."""
    size = load_subject("DiT-S-8", size=512, with_vae=False)
    assert (size.name, size.size, size.weights) == ("S/8", 512, "random")
    assert size.model.config == ModelConfig.named("S/8", 512)
    subject, own = load_subject(model), tiny_dit()
    assert subject.size == 16 and subject.weights != "random" and subject.label_names == NAMES
    assert torch.equal(subject.model.blocks[0].mlp.fc1.weight, own.blocks[0].mlp.fc1.weight)  # pyright: ignore
    with pytest.raises(ValueError, match="--size is for published models"):
        load_subject(model, size=256)
    twin = in_numerics(own, "diffusers")
    assert in_numerics(own, "official") is own
    assert twin.pos_embed.data_ptr() == own.pos_embed.data_ptr()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([500, 900]), torch.tensor([1, 2])
    expected = tiny_dit(numerics="diffusers", mlp_norm_eps=1e-5)(x, t, y)
    assert torch.equal(twin(x, t, y), expected) and not torch.allclose(own(x, t, y), expected)


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
@pytest.mark.skipif(find_spec("openvino") is None, reason="no openvino")
def test_ctrl_c_is_heard_after_openvino() -> None:
    """OpenVINO's plugins replace the stack for signals, and may leave one that is freed."""
    done = subprocess.run([sys.executable, "-c", AFTER_OPENVINO], capture_output=True, text=True,
                          timeout=120)  # fmt: skip
    assert done.returncode == 0 and "heard" in done.stdout, done.stderr[-2000:]


def test_random_weights_are_all_drawn_and_the_same_every_time() -> None:
    """They are drawn into memory that held anything before."""
    config = VAEConfig(block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8)
    for make in (partial(random_model, CONFIG), partial(random_vae, config)):
        one, other = make().state_dict(), make().state_dict()
        for name, weight in one.items():
            assert torch.equal(weight, other[name]) and weight.std() > 0.01, name
    expected = DiT(CONFIG).pos_embed
    assert torch.equal(random_model(CONFIG).pos_embed, expected)
