"""Attention of other packages by name: it runs and is right, or the error says what is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import cases
import pytest
import torch
from numerics import assert_close_to_reference
from torch import Tensor

import dit_kernels
from dit_kernels import Unavailable, attention_libraries, dispatch, reference

CPU = torch.device("cpu")
QKV, HEADS = cases.qkv_of(2, 37, 3, 72, torch.float32), 3


@pytest.fixture(autouse=True)
def _no_memory() -> Iterator[None]:
    attention_libraries._flash_attn.cache_clear()
    yield
    attention_libraries._flash_attn.cache_clear()


def installed(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    module: Any = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v (N, T, H, d) each, as FlashAttention takes them → (N, T, H, d)."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def check(impl: str) -> None:
    for qkv, heads in ((QKV, HEADS), (QKV[:0], HEADS), (cases.qkv_of(1, 1, 1, 8, QKV.dtype), 1)):
        found = dit_kernels.attention(qkv, heads, impl=impl)
        assert found.is_contiguous()
        if len(qkv) > 0:
            exact = reference.attention(qkv.double(), heads)
            assert_close_to_reference(found, exact, same_dtype=reference.attention(qkv, heads))
    out = torch.empty(2, 37, 216)
    assert attention_libraries.launcher(impl)(QKV, HEADS, out=out) is out
    assert torch.equal(out, dit_kernels.attention(QKV, HEADS, impl=impl))
    compiled = torch.compile(
        lambda x: dit_kernels.attention(x, HEADS, impl=impl), backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(QKV), out)


def test_flash_attention_of_torch() -> None:
    check("flash")


@pytest.mark.parametrize("version", ["2", "4", "4 with the log-sum-exp"])
def test_flash_attn_by_its_package(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if version == "2":
        monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
        packed = {"flash_attn_qkvpacked_func": lambda qkv: heads_last(*qkv.unbind(2))}
        installed(monkeypatch, "flash_attn", **packed)
    else:
        pair = "log" in version
        installed(monkeypatch, "flash_attn")
        four = {"flash_attn_func": lambda *qkv: (heads_last(*qkv), 0) if pair else heads_last(*qkv)}
        installed(monkeypatch, "flash_attn.cute", **four)
    check("flash-attn")


def test_the_version_of_flash_attn_depends_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "flash_attn", flash_attn_qkvpacked_func=2)
    installed(monkeypatch, "flash_attn.cute", flash_attn_func=4)
    cuda = torch.device("cuda")
    for capability, version in (((8, 0), 2), ((9, 0), 4), ((10, 0), 4)):
        with patch("torch.cuda.get_device_capability", return_value=capability):
            newest = attention_libraries._newest_first(cuda)
        assert attention_libraries._flash_attn(newest) == (version, version == 2)


def test_a_missing_library_is_named_and_nothing_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, None)
    for impl, reason in (
        (
            "flash-attn",
            "the package flash-attn is needed, .*: pip install flash-attn .* flash-attn-4",
        ),
        ("cudnn", "cuDNN is for CUDA devices, not for cpu$"),
    ):
        with pytest.raises(Unavailable, match=f"^impl '{impl}': {reason}") as error:
            dit_kernels.attention(QKV, HEADS, impl=impl)
        assert "\n" not in str(error.value)
        with pytest.raises(Unavailable, match=f"layernorm_modulate has no {impl} implementation"):
            dit_kernels.layernorm_modulate(QKV, QKV[:, 0], QKV[:, 0], impl=impl)


def test_a_package_that_breaks_while_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build for another version of torch may do so. The lean backend then runs without it."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise OSError('other\\nsymbols')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Unavailable, match=r"^impl 'flash-attn': .*\(other symbols\)$"):
        dit_kernels.attention(QKV, HEADS, impl="flash-attn")


def test_a_call_that_the_library_refuses_raises_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch has no cuDNN kernel for the CPU, and must not use another kernel instead."""
    with pytest.raises(Unavailable, match=r"^impl 'cudnn': Could not run .*cudnn_attention' with"):
        attention_libraries.launcher("cudnn")(QKV, HEADS)

    def refuse(*_: Tensor) -> Tensor:
        raise RuntimeError("FlashAttention only supports\nAmpere GPUs or newer.")

    installed(monkeypatch, "flash_attn.cute", flash_attn_func=refuse)
    with pytest.raises(Unavailable, match=r"^impl 'flash-attn': .* only supports Ampere GPUs or"):
        dit_kernels.attention(QKV, HEADS, impl="flash-attn")

    def no_room(*_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    attention_libraries._flash_attn.cache_clear()
    installed(monkeypatch, "flash_attn.cute", flash_attn_func=no_room)
    with pytest.raises(torch.OutOfMemoryError):
        dit_kernels.attention(QKV, HEADS, impl="flash-attn")


def test_torchs_global_switches_are_not_changed() -> None:
    """The switches are for the whole process, so other threads would see a change."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert not torch.backends.cuda.flash_sdp_enabled()
        check("flash")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["cudnn", "flash"])
def test_torchs_kernels_on_a_gpu(impl: str) -> None:
    for d in (64, 72):
        qkv = cases.qkv_of(2, 256, HEADS, d, torch.bfloat16)
        exact, same = reference.attention(qkv.double(), HEADS), reference.attention(qkv, HEADS)
        found = dit_kernels.attention(qkv.cuda(), HEADS, impl=impl)
        assert found.is_contiguous()
        assert_close_to_reference(found, exact, same_dtype=same)


def test_a_gradient_is_never_dropped() -> None:
    for impl in attention_libraries.NAMES:
        with pytest.raises(Unavailable, match="attention has no backward pass there"):
            dit_kernels.attention(QKV.clone().requires_grad_(), HEADS, impl=impl)
    assert dispatch.chosen("attention", "auto", CPU) in ("native", "reference")
