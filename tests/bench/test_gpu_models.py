"""Whole models in the GPU benchmark: who is measured, and what is refused to be timed."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_runs import CPU, LEAN, measured
from tiny import tiny_dit

from dit_bench import gpu_contenders, gpu_models, gpu_peers
from dit_bench.gpu import Plan
from dit_bench.gpu_contenders import EAGER, Contender
from dit_bench.gpu_inputs import random_model
from dit_engine import backends
from dit_engine.backends.eager import EagerBackend
from dit_engine.config import ModelConfig
from dit_engine.engine import Engine


class WrongBackend(EagerBackend):
    """Off by a tenth."""

    def prepare(self, labels: torch.Tensor, timesteps: torch.Tensor) -> Any:
        right = super().prepare(labels, timesteps)
        return lambda x, step: 1.1 * right(x, step)


class BrokenBackend(EagerBackend):
    def prepare(self, labels: torch.Tensor, timesteps: torch.Tensor) -> Any:
        raise RuntimeError("kernel image is\ninvalid")


def test_wrong_and_broken_backends_fail_and_are_not_timed(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WrongBackend", "BrokenBackend"):
        monkeypatch.setitem(backends._FACTORIES, name, (__name__, name))
    contenders = tuple(Contender(n, n, "bf16") for n in ("WrongBackend", "BrokenBackend"))
    plan = replace(plan, contenders=(*contenders, EAGER), cases=[])
    code, values = measured(plan, tmp_path / "gpu.json")
    assert code == 1
    rows = [r for section in ("forwards", "generate") for r in values[section]]
    for row in rows:
        if row["contender"] == "eager bf16":
            assert row["status"] == "ok"
        else:
            assert row["status"] == "failed"
            assert "ms" not in row and "images_per_s" not in row
    wrong = [r for r in rows if r["contender"] == "WrongBackend"]
    assert [r["error"] for r in wrong[:2]] == pytest.approx([0.1, 0.1], abs=0.02)
    assert "latents' rms error" in wrong[2]["reason"]
    assert rows[1]["reason"] == "RuntimeError: kernel image is invalid"


def test_random_models_have_modulations_that_are_not_zero() -> None:
    model = random_model(tiny_dit().config, CPU)
    assert all(p.abs().max() > 0 for p in model.parameters())
    assert torch.equal(model.pos_embed, tiny_dit().pos_embed)


def test_a_model_that_cannot_be_made_fails_and_the_next_is_measured(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = gpu_models.random_model

    def picky(config: ModelConfig, device: torch.device) -> Any:
        if config.depth == 1:
            raise RuntimeError("too shallow")
        return make(config, device)

    monkeypatch.setattr(gpu_models, "random_model", picky)
    config = plan.configs["tiny"]
    configs = {"flat": replace(config, depth=1), "tiny": config}
    code, values = measured(replace(plan, configs=configs, cases=[]), tmp_path / "gpu.json")
    assert code == 1
    assert values["forwards"][0]["reason"] == "RuntimeError: too shallow"
    assert {r["model"] for r in values["generate"]} == {"tiny"}


def test_backends_of_other_packages_are_contenders(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("auto", "eager", "compile", "lean", "onnxruntime", "theirs")
    monkeypatch.setattr(gpu_contenders, "known_backends", lambda: names)
    found = gpu_contenders.cuda_contenders()
    assert found[: len(gpu_contenders.CUDA_CONTENDERS)] == gpu_contenders.CUDA_CONTENDERS
    added = found[len(gpu_contenders.CUDA_CONTENDERS) :]
    assert [(c.name, c.backend, c.late) for c in added] == [
        ("onnxruntime bf16", "onnxruntime", True), ("theirs bf16", "theirs", True)]  # fmt: skip
    assert all(c.generates and c.meets(2, 2) and not c.meets(64, 2) for c in added)
    peers = {c.backend for c in found if c.factory is not None}
    assert peers == {"diffusers", "max-autotune", "compile blocks"}


def test_diffusers_is_a_contender_in_its_own_numerics(plan: Plan, tmp_path: Path) -> None:
    (theirs,) = (c for c in gpu_contenders.CUDA_CONTENDERS if c.backend == "diffusers")
    plan = replace(plan, contenders=(EAGER, theirs), cases=[], batches=(2,))
    code, values = measured(plan, tmp_path / "gpu.json")
    row = {r["contender"]: r for r in values["forwards"]}["diffusers bf16"]
    assert code == 0
    if find_spec("diffusers") is None:
        assert row["status"] == "skipped" and "diffusers" in row["reason"]
        return
    assert row["status"] == "ok" and row["ms"]["median"] > 0
    assert 0 < row["error"] <= 4 * row["eager_bf16_error"]
    wrong = replace(theirs, numerics="official")  # another function: named, and not timed
    code, values = measured(replace(plan, contenders=(EAGER, wrong)), tmp_path / "gpu.json")
    row = {r["contender"]: r for r in values["forwards"]}["diffusers bf16"]
    assert code == 0 and row["status"] == "skipped" and "ms" not in row
    assert row["reason"].startswith("peer: error")


def test_the_autotuned_peer_is_compiled_in_that_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def compiled(function: Any, **options: Any) -> Any:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    model = tiny_dit()
    backend = gpu_peers.MaxAutotuneBackend(model, "fp32", CPU)
    labels, timesteps, x = torch.tensor([1, 2]), torch.tensor([999, 3]), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = model(x, timesteps[1].expand(2), labels)
        assert torch.equal(backend.prepare(labels, timesteps)(x, 1), expected)
    assert asked == [{"fullgraph": True, "dynamic": False, "mode": "max-autotune"}]


def test_one_compilation_a_batch_size_serves_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, graphs = torch.compile, list[object]()

    def counted(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend=counted, **how))
    model = tiny_dit(depth=3)
    backend = gpu_peers.CompiledBlocksBackend(model, "fp32", CPU)
    timesteps, x = torch.tensor([999, 3]), torch.randn(3, 4, 8, 8)
    for batch, compiled in ((2, 1), (3, 2), (2, 2)):
        labels = torch.arange(batch)
        with torch.inference_mode():
            expected = model(x[:batch], timesteps[1].expand(batch), labels)
            found = backend.prepare(labels, timesteps)(x[:batch], 1)
        torch.testing.assert_close(found, expected)
        assert len(graphs) == compiled
    assert all("forward" not in vars(block) for block in model.blocks)  # it stays as it is


def test_wrong_pixels_fail(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = Engine.generate

    def tinted(self: Engine, *labels: Any, **options: Any) -> Any:
        made = generate(self, *labels, **options)
        wrong = options["output"] == "np" and options["backend"] == "lean"
        return replace(made, images=made.images // 2) if wrong else made

    monkeypatch.setattr(Engine, "generate", tinted)
    code, values = measured(replace(plan, contenders=(EAGER, LEAN), cases=[]), tmp_path / "a.json")
    rows = {r["contender"]: r for r in values["pixels"]}
    assert code == 1 and rows["eager bf16"]["status"] == "ok"
    assert rows["lean bf16"]["reason"].startswith("pixels' rms error")
    assert "images_per_s" not in rows["lean bf16"]
