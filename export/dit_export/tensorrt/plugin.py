"""adaLN as a quick-deployable TensorRT plugin, compiled ahead of time from the Triton kernel.

An engine that holds it carries the PTX, and needs neither Triton nor Python code when it runs.
Only the standard TensorRT has such plugins.
"""

# No postponed annotations here: TensorRT reads the functions' annotations as types.
# pyright: reportInvalidTypeForm=false

import functools
from importlib import import_module
from typing import Any

NAMESPACE, NAME = "dit", "layernorm_modulate"
PLUGIN = f"{NAMESPACE}::{NAME}"
EPS = 1e-6
"""Of its LayerNorm; there is no other."""

IO = ("x", "shift", "scale", "output")


def register_plugin(capability: str) -> None:
    """Register `PLUGIN` with TensorRT, once a process, for GPUs of ``capability`` such as "9.0".

    Raises ImportError where TensorRT, its plugin module or Triton is missing.
    """
    try:
        trt, trtp = import_module("tensorrt"), import_module("tensorrt.plugin")
        import_module("triton")
    except ImportError as error:
        raise ImportError(
            f"the adaLN plugin needs the standard TensorRT and Triton ({error}): "
            "pip install 'dit-engine[tensorrt]'"
        ) from None
    _register(trt, trtp, capability)


@functools.cache
def _register(trt: Any, trtp: Any, capability: str) -> None:
    from dit_export.tensorrt.plugin_kernel import DTYPES, ROWS, compile_kernel

    # TensorRT's data type → Triton's name for it.
    dtypes = {getattr(trt.DataType, name): dtype for name, dtype in (
        ("FLOAT", "fp32"), ("HALF", "fp16"), ("BF16", "bf16"))}  # fmt: skip
    assert set(dtypes.values()) == set(DTYPES)

    @trtp.register(PLUGIN)
    def describe(
        x: trtp.TensorDesc, shift: trtp.TensorDesc, scale: trtp.TensorDesc
    ) -> trtp.TensorDesc:
        return x.like()

    @trtp.autotune(PLUGIN)
    def autotune(
        x: trtp.TensorDesc,
        shift: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
    ) -> list[trtp.AutoTuneCombination]:
        # The i-th of every list together: all four tensors have one type.
        types = ", ".join(["FP32|FP16|BF16"] * len(IO))
        return [trtp.AutoTuneCombination(types, "LINEAR", list(ROWS))]

    @trtp.aot_impl(PLUGIN)
    def implement(
        x: trtp.TensorDesc,
        shift: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        width = x.shape_expr[2].constant_value()
        kernel = compile_kernel(width, dtypes[x.dtype], tactic or ROWS[0], capability)
        images, tokens = x.shape_expr[0], x.shape_expr[1]
        blocks = trtp.cdiv(tokens, kernel.rows)
        launch = trtp.KernelLaunchParams()
        launch.grid_x = images * blocks
        launch.block_x = kernel.threads
        launch.shared_mem = kernel.shared_bytes
        arguments = trtp.SymIntExprs(2)
        arguments[0] = trtp.SymInt32(tokens)
        arguments[1] = trtp.SymInt32(blocks)
        return kernel.entry, kernel.ptx, launch, arguments
