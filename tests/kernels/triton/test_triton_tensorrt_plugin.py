"""The adaLN operator as a TensorRT plugin, without TensorRT: its PTX and its launches."""

from __future__ import annotations

import re
import types
from typing import Any

import pytest
import torch
from triton_workers import compilers, interpreted, require_triton

from dit_export.tensorrt import plugin

CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
WIDTH = 1152


def compiled(width: int, dtype: str, rows: int, capability: str) -> Any:
    from dit_export.tensorrt.plugin_kernel import compile_kernel

    return compile_kernel(width, dtype, rows, capability)


def resources(ptx: str, capability: str) -> tuple[int, int]:
    """(registers, spills) of PTX assembled by the ptxas that comes with Triton."""
    import subprocess
    import tempfile
    from pathlib import Path

    import triton.backends

    tool = Path(triton.backends.__file__).parent / "nvidia" / "bin" / "ptxas"
    target = re.search(r"\.target (\S+)", ptx)
    assert target is not None and target[1].startswith(f"sm_{capability.replace('.', '')}")
    blackwell = tool.with_name("ptxas-blackwell")
    if capability.startswith(("10", "12")) and blackwell.exists():
        tool = blackwell
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [tool, "-v", f"--gpu-name={target[1]}", path, "-o", Path(folder) / "out.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert used is not None and spilled is not None, said
    return int(used[1]), int(spilled[1])


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_ptx_is_what_the_launch_says(capability: str):
    require_triton()
    kernels = compilers().map(
        compiled, [WIDTH] * 3, ["bf16", "fp16", "fp32"], [1, 2, 4], [capability] * 3
    )
    for kernel, rows in zip(kernels, (1, 2, 4), strict=True):
        assert kernel.entry == "_layernorm_modulate_plugin_kernel" and kernel.rows == rows
        assert re.findall(r"\.visible \.entry (\w+)\(", kernel.ptx) == [kernel.entry]
        # Three inputs, two integers, one output: what TensorRT passes, in its order.
        declared = re.search(r"\.entry \w+\((.*?)\)", kernel.ptx, re.DOTALL)
        assert declared is not None
        types_ = re.findall(r"\.param \.(\w+)", declared[1])
        assert types_ == ["u64", "u64", "u64", "u32", "u32", "u64"]
        assert re.search(rf"\.reqntid {kernel.threads}\b", kernel.ptx)
        assert kernel.threads == 128 and kernel.shared_bytes % 16 == 0
        # Dynamic shared memory, which the launch asks for; at most what every device has.
        assert ".extern .shared" in kernel.ptx and 0 < kernel.shared_bytes <= 48 * 1024
        assert not re.search(r"^\s*\.(file|loc)\b", kernel.ptx, re.MULTILINE)  # nor any path
        registers, spills = resources(kernel.ptx, capability)
        assert spills == 0 and registers <= 255


@interpreted
def _runs_as_the_reference(width: int, tokens: int, rows: int) -> None:
    from dit_export.tensorrt.plugin_kernel import (
        EPS,
        PluginKernel,
        _layernorm_modulate_plugin_kernel,
    )
    from dit_kernels import reference
    from dit_kernels.triton.launch import row_tiles

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, width, generator=generator)
    shift, scale = torch.randn(2, 2, width, generator=generator)
    out = torch.full_like(x, 7.0)
    head, tail, _, num_warps = row_tiles(width)
    kernel = PluginKernel("", "", rows, num_warps * 32, 0)
    blocks = kernel.programs_an_image(tokens)
    _layernorm_modulate_plugin_kernel[(2 * blocks,)](
        x, shift, scale, tokens, blocks, out,
        EPSILON=EPS, D=width, HEAD=head, TAIL=tail, ROWS_EACH=rows,
    )  # fmt: skip
    exact = reference.layernorm_modulate(x.double(), shift.double(), scale.double(), EPS)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "tokens", "rows"), [(48, 5, 1), (48, 5, 2), (1152, 3, 4)])
def test_the_kernel_equals_the_reference(width: int, tokens: int, rows: int):
    _runs_as_the_reference(width=width, tokens=tokens, rows=rows)


def test_parameters_that_are_read_stay():
    require_triton()
    from dit_export.tensorrt.plugin_kernel import only_parameters

    ptx = (
        ".visible .entry f(\n\t.param .u64 f_param_0,\n\t.param .u64 f_param_1,\n"
        "\t.param .u64 f_param_2\n)\n{ ld.param.b64 %rd1, [f_param_1]; }"
    )
    kept = only_parameters(ptx, "f", 2)
    assert "f_param_2" not in kept and "f_param_1\n)" in kept and kept.endswith("[f_param_1]; }")
    with pytest.raises(ValueError, match="reads f_param_1, which TensorRT does not pass"):
        only_parameters(ptx, "f", 1)
    with pytest.raises(ValueError, match="no entry g"):
        only_parameters(ptx, "g", 1)


class Symbol(int):
    """A dimension whose value is known, with what `tensorrt.plugin.ShapeExpr` has."""

    def constant_value(self) -> int:
        return int(self)

    def __mul__(self, other: int) -> Symbol:
        return Symbol(int(self) * int(other))


class FakePlugins:
    """`tensorrt.plugin` as far as registration goes: it keeps the functions by what they are."""

    class TensorDesc:
        def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
            self.shape_expr, self.dtype = [Symbol(n) for n in shape], dtype

        def like(self) -> Any:
            return self

    class KernelLaunchParams:
        pass

    class AutoTuneCombination:
        def __init__(self, types_: str, layout: str, tactics: list[int]) -> None:
            self.types, self.layout, self.tactics = types_, layout, tactics

    SymInt32 = Symbol

    class SymIntExprs(list):
        def __init__(self, length: int) -> None:
            super().__init__([None] * length)

    def __init__(self) -> None:
        self.functions: dict[str, Any] = {}
        for kind in ("register", "autotune", "aot_impl"):
            setattr(self, kind, self._decorator(kind))

    def _decorator(self, kind: str) -> Any:
        def decorate(name: str) -> Any:
            assert name == "dit::layernorm_modulate"
            return lambda function: self.functions.setdefault(kind, function)

        return decorate

    @staticmethod
    def cdiv(a: int, b: int) -> Symbol:
        return Symbol(-(-int(a) // b))


@pytest.fixture
def registered() -> FakePlugins:
    require_triton()
    fake = FakePlugins()
    trt = types.SimpleNamespace(DataType=types.SimpleNamespace(FLOAT="F", HALF="H", BF16="B"))
    plugin._register.__wrapped__(trt, fake, "9.0")
    return fake


def test_registration_has_the_signatures_that_tensorrt_reads(registered: FakePlugins):
    import inspect

    describe, autotune, implement = (
        registered.functions[kind] for kind in ("register", "autotune", "aot_impl")
    )
    tensor = FakePlugins.TensorDesc
    names = ["x", "shift", "scale"]
    assert list(inspect.signature(describe).parameters) == names
    assert list(inspect.signature(autotune).parameters) == [*names, "outputs"]
    assert list(inspect.signature(implement).parameters) == [*names, "outputs", "tactic"]
    # Types and no strings: TensorRT checks them by issubclass.
    assert inspect.signature(describe).return_annotation is tensor
    assert inspect.signature(implement).parameters["tactic"].annotation is int
    (combination,) = autotune(None, None, None, None)
    assert combination.tactics == [1, 2, 4] and combination.layout == "LINEAR"
    assert combination.types == ", ".join(["FP32|FP16|BF16"] * 4)


@pytest.mark.parametrize(("tokens", "tactic", "programs"), [(256, 2, 3 * 128), (37, 4, 3 * 10)])
def test_launch_parameters(registered: FakePlugins, tokens: int, tactic: int, programs: int):
    kernel = compilers().submit(compiled, WIDTH, "bf16", tactic, "9.0").result()
    tensor = FakePlugins.TensorDesc
    x, row = tensor((3, tokens, WIDTH), "B"), tensor((3, WIDTH), "B")
    from dit_export.tensorrt import plugin_kernel

    plugin_kernel.compile_kernel.cache_clear()
    entry, ptx, launch, arguments = registered.functions["aot_impl"](x, row, row, (x,), tactic)
    assert (entry, len(ptx)) == (kernel.entry, len(kernel.ptx))
    assert (launch.grid_x, launch.block_x) == (programs, 128)
    assert launch.shared_mem == kernel.shared_bytes
    assert list(arguments) == [tokens, programs // 3]


def test_without_tensorrt_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(plugin, "import_module", absent)
    with pytest.raises(ImportError, match=r"standard TensorRT and Triton .*dit-engine\[tensorrt\]"):
        plugin.register_plugin("9.0")
