"""What the lean forward chooses by measurement: its candidates, and forwards with each."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from numerics import assert_close_to_reference
from products import require_int8
from tiny import tiny_dit
from torch import Tensor
from triton_workers import interpreted

from dit_engine.backends.lean.choices import ChosenParts, by_measurement, candidates
from dit_engine.backends.lean.conditioning import Conditioning
from dit_engine.backends.lean.forward import LeanTransformer
from dit_kernels.chooser import Chooser, Times

CPU, BF16 = torch.device("cpu"), torch.bfloat16
ROWS = 3


class Forward:
    """A tiny model with XL's head dimension, and hidden layers wide enough for split products."""

    def __init__(self) -> None:
        self.model = tiny_dit(hidden_size=144, num_heads=2, mlp_ratio=4.0)
        with plain_weights():
            self.transformer = LeanTransformer(self.model, BF16, CPU)
        config, draw = self.model.config, torch.Generator().manual_seed(3)
        self.z = torch.randn(ROWS, *config.latent_shape, generator=draw)
        self.t, self.labels = torch.tensor([400]), torch.tensor([1, 10, 3])

    def __call__(self) -> Tensor:
        conditioning = Conditioning(self.model, BF16, CPU)
        with torch.inference_mode():
            modulation = conditioning.rows(conditioning.embed(self.t), self.labels, False)[0]
            x = torch.empty(ROWS, self.model.config.num_tokens, 144, dtype=BF16)
            self.transformer.embed(self.z, x)
            return self.transformer.unpatchify(self.transformer.forward(x, modulation))

    def eager(self, dtype: torch.dtype) -> Tensor:
        model = copy.deepcopy(self.model).to(dtype)
        with torch.no_grad():
            return model(self.z.to(dtype), self.t.expand(ROWS), self.labels)


def plain_weights() -> Any:
    """Products keep plain weights, as on CUDA, and do not pack them for the CPU."""
    return patch.multiple(
        "dit_kernels.linear", onednn_takes=lambda _: False,
        native_product=type("None", (), {"why_not": staticmethod(lambda _: "not here")}),
    )  # fmt: skip


@pytest.mark.slow
@interpreted
def test_the_forward_with_each_candidate_equals_the_eager_model() -> None:
    forward = Forward()
    transformer = forward.transformer
    exact, same = forward.eager(torch.float64), forward.eager(BF16)
    found = candidates(transformer, ROWS)
    assert {*found} == {"qkv", "attention", "proj", "fc1", "fc2"}
    assert all("library" in found[part] for part in found if part != "attention")
    assert any("split" in name for name in found["fc2"])
    assert any("residual" in name for name in found["proj"])
    for part, ways in found.items():
        assert len(ways) > 1
        for way in ways.values():
            called = Mock(side_effect=way)
            parts = replace(transformer.usual, **{part: called})
            transformer.parts = lambda rows, parts=parts: parts
            assert_close_to_reference(forward(), exact, same_dtype=same)
            assert called.call_count == forward.model.config.depth


@pytest.mark.slow
@interpreted
def test_the_forward_runs_the_chosen_candidates() -> None:
    """All candidates pass the comparison with the default. The forward runs those that the clock
    favours, and keeps them for this number of rows."""
    forward, favoured = Forward(), ["tma 64x64", "with residual", "128x128"]
    calls: list[str] = []
    memory: dict[str, Times] = {}
    chooser = Chooser(memory.get, memory.__setitem__, lambda run: 1.0, lambda: 0.0)

    def measured(key: str, runs: Any, prepare: Callable[[], object]) -> str:
        calls.append(key)
        with patch("dit_kernels.chooser.ROUNDS", (1, 1)):
            usual = honest(key, runs, prepare)
        assert None not in memory[key].values(), memory[key]
        return next((n for f in favoured for n in runs if f in n), usual)

    honest, chooser.choose = chooser.choose, measured  # pyright: ignore[reportAttributeAccessIssue]
    transformer = forward.transformer
    chosen = transformer.parts = ChosenParts(transformer, chooser)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = forward()
    assert sorted(calls) == [
        "attention 3x16x432 to 144, 2 heads, bfloat16", "fc1 3x16x144 to 576, bfloat16",
        "fc2 3x16x576 to 144, bfloat16", "proj 3x16x144 to 144, bfloat16",
        "qkv 3x16x144 to 432, bfloat16",
    ]  # fmt: skip
    parts = chosen(ROWS)
    assert chosen(ROWS) is parts and len(calls) == 5
    with ThreadPoolExecutor(1) as elsewhere, chosen._lock:  # while another thread measures
        assert elsewhere.submit(chosen, ROWS).result(10) is parts
    assert chosen(ROWS + 1) is not parts and len(calls) == 10
    assert {"with_residual"} == {getattr(p, "func", p).__name__ for p in (parts.proj, parts.fc2)}
    exact, same = forward.eager(torch.float64), forward.eager(BF16)
    assert_close_to_reference(made, exact, same_dtype=same)
    transformer.parts = lambda rows: parts
    assert torch.equal(forward(), made)


@interpreted
def test_parts_without_candidates() -> None:
    """Float32 has no candidates, quantised forwards have them for attention only, and heads of a
    size without kernels have none for attention."""
    model = tiny_dit(hidden_size=144, num_heads=2)
    with plain_weights():
        assert candidates(LeanTransformer(model, torch.float32, CPU), 2) == {}
        odd = LeanTransformer(tiny_dit(num_heads=4), BF16, CPU)
    assert {*candidates(odd, 2)} == {"qkv", "proj", "fc1", "fc2"}
    assert candidates(odd, 0) == {}
    require_int8()
    assert {*candidates(LeanTransformer(model, BF16, CPU, "int8"), 2)} == {"attention"}


@interpreted
def test_too_little_memory_to_measure_is_no_error() -> None:
    forward = Forward()
    forward.transformer.parts = ChosenParts(forward.transformer, Chooser({}.get, {}.update, float))
    no_room = patch("dit_engine.backends.lean.choices.Example", side_effect=torch.OutOfMemoryError)
    with no_room, pytest.warns(UserWarning, match="^too little memory to measure a forward of 3 r"):
        made = forward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(forward(), made)  # without another try


@interpreted
def test_weights_are_freed_with_their_transformer() -> None:
    transformer = Forward().transformer
    with patch.dict("os.environ", DIT_KERNELS_CHOOSE="0"):
        transformer.parts = ChosenParts(transformer, Chooser({}.get, {}.update, float))
        transformer.parts(ROWS)
    freed = weakref.ref(transformer)
    gc.disable()
    try:
        del transformer
        assert freed() is None
    finally:
        gc.enable()


@interpreted
def test_kernels_compile_and_run_after_an_interrupt() -> None:
    from triton.runtime import _async_compile

    from dit_kernels.triton.compiling import only_compiling
    from dit_kernels.triton.launch import ONLY_COMPILING

    interrupt = patch.object(_async_compile, "as_completed", side_effect=KeyboardInterrupt)
    with interrupt, pytest.raises(KeyboardInterrupt), only_compiling(1, CPU):
        pass
    assert _async_compile.active_mode.get() is None and not ONLY_COMPILING.get()


@interpreted
def test_no_file_is_touched_if_choosing_is_turned_off() -> None:
    transformer = Forward().transformer
    with patch("dit_engine.backends.lean.choices.ChoiceFile") as file:
        for value, chosen in (("0", False), ("1", True)):
            with patch.dict("os.environ", DIT_KERNELS_CHOOSE=value):
                assert (by_measurement(transformer) is not transformer.parts) is chosen
            assert file.called is chosen
        with (
            patch.dict("os.environ", DIT_KERNELS_CHOOSE="on"),
            pytest.raises(ValueError, match=r"^DIT_KERNELS_CHOOSE='on': choose 0"),
        ):
            by_measurement(transformer)


def test_nothing_is_chosen_without_triton() -> None:
    with patch("dit_kernels.triton.why_not", return_value="not installed"):
        assert candidates(LeanTransformer(tiny_dit(), BF16, CPU), 2) == {}
