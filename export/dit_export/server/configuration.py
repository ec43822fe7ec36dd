"""Write config.pbtxt of every model: its inputs and outputs, batching, placement and warm-up."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dit_engine.arguments import choice, shown, whole_number
from dit_export.bundle import Bundle, TensorSpec
from dit_export.server.origin import HEADER_INPUTS

PLATFORMS = ("onnxruntime", "tensorrt")
ACCELERATORS = ("cuda", "tensorrt", "none")

GRAPHS = {
    "dit_transformer": "transformer",
    "dit_guided_step": "guided_step",
    "vae_decoder": "vae_decoder",
}
"""Model in the repository → graph in the export."""

ENGINE_CACHE = "trt-cache"
"""Where onnxruntime's TensorRT provider keeps its engines, relative to the directory that the
server runs in. In /tmp, others could put engines there beforehand."""


class Enum(str):
    """A word that is written without quotation marks; only this module makes them."""


_TYPES = {"float32": Enum("TYPE_FP32"), "int64": Enum("TYPE_INT64")}


@dataclass(frozen=True)
class ServingOptions:
    """How a repository's models run.

    Attributes:
        platform: "onnxruntime" or "tensorrt".
        accelerator: what onnxruntime uses on a GPU: its CUDA provider, its TensorRT provider, or
            "none" for the server's own choice. On a CPU it has no effect.
        max_batch_size: images in one batch; guided_step computes twice as many.
        instances: copies of each graph's model on every device.
        pipelines: sampling loops that "dit" runs at once; their steps share batches.
        queue_delay_us: how long a request may wait for others, to share a batch with them.
        queue_size: requests that may wait for "dit"; further ones are refused at once.
    """

    platform: str = "onnxruntime"
    accelerator: str = "cuda"
    max_batch_size: int = 16
    instances: int = 1
    pipelines: int = 2
    queue_delay_us: int = 2000
    queue_size: int = 256

    def checked(self) -> ServingOptions:
        """The same options; ValueError that names the first option out of its range."""
        choice("platform", self.platform, PLATFORMS)
        choice("accelerator", self.accelerator, ACCELERATORS)
        counts = {}
        for name in ("max_batch_size", "instances", "pipelines", "queue_delay_us", "queue_size"):
            least, most = int(name != "queue_delay_us"), 2**31 - 1
            value = whole_number(given := getattr(self, name))
            if value is None or not least <= value <= most:
                raise ValueError(f"{name} {shown(given)} is not a number from {least} to {most}")
            counts[name] = value
        return replace(self, **counts)


def graph_config(name: str, bundle: Bundle, options: ServingOptions) -> str:
    """config.pbtxt of one of `GRAPHS`."""
    graph = bundle.graph(GRAPHS[name])
    onnx = options.platform == "onnxruntime"
    parameters = {
        "checkpoint": bundle.vae_checkpoint if name == "vae_decoder" else bundle.checkpoint,
        "dtype": graph.dtype,
        "graph": graph.name,
        "guided_channels": str(bundle.guided_channels),
        "model": json.dumps(bundle.config.to_dict()),
        "producer": bundle.manifest["producer"],
    }
    side = bundle.config.input_size
    pixels = side if bundle.vae is None else side * bundle.vae.downsampling
    inputs = [_tensor(spec, side) for spec in graph.inputs]
    zeros = [  # a valid label and time step, too
        {"key": tensor["name"],
         "value": {"data_type": tensor["data_type"], "dims": tensor["dims"], "zero_data": True}}
        for tensor in inputs
    ]  # fmt: skip
    return to_pbtxt({
        "name": name,
        "platform": "onnxruntime_onnx" if onnx else "tensorrt_plan",
        "max_batch_size": options.max_batch_size,
        "input": inputs,
        "output": [_tensor(spec, pixels) for spec in graph.outputs],
        "version_policy": {"latest": {"num_versions": 1}},
        "dynamic_batching": {"max_queue_delay_microseconds": options.queue_delay_us},
        "instance_group": {"kind": Enum("KIND_AUTO" if onnx else "KIND_GPU"),
                           "count": options.instances},
        "optimization": _optimization(graph.dtype, options),
        "model_warmup": [{"name": f"{n} at once", "batch_size": n, "inputs": zeros}
                         for n in sorted({1, options.max_batch_size})],
        "parameters": [{"key": key, "value": {"string_value": value}}
                       for key, value in parameters.items()],
    })  # fmt: skip


def pipeline_config(bundle: Bundle, options: ServingOptions) -> str:
    """config.pbtxt of "dit". It has no warm-up: the models that it calls may load after it."""
    assert bundle.vae is not None
    side = bundle.config.input_size * bundle.vae.downsampling
    kinds = {
        "labels": "TYPE_INT64", "label_names": "TYPE_STRING", "seeds": "TYPE_INT64",
        "steps": "TYPE_INT64", "guidance_scale": "TYPE_FP32", "sampler": "TYPE_STRING",
    } | dict.fromkeys(HEADER_INPUTS, "TYPE_STRING")  # fmt: skip
    columns = [
        {"name": name, "data_type": Enum(kind), "dims": [1]}
        | ({} if name == "seeds" else {"optional": True})
        for name, kind in kinds.items()
    ]
    return to_pbtxt({
        "name": "dit",
        "backend": "python",
        "max_batch_size": options.max_batch_size,
        "input": columns,
        "output": {"name": "images", "data_type": Enum("TYPE_UINT8"),
                   "dims": [side, side, bundle.vae.out_channels]},
        "version_policy": {"latest": {"num_versions": 1}},
        "dynamic_batching": {
            "max_queue_delay_microseconds": 5 * options.queue_delay_us,
            "default_queue_policy": {"max_queue_size": options.queue_size},
        },
        "instance_group": {"kind": Enum("KIND_CPU"), "count": options.pipelines},
        "parameters": {"key": "checkpoint", "value": {"string_value": bundle.checkpoint}},
    })  # fmt: skip


def _tensor(spec: TensorSpec, side: int) -> dict[str, Any]:
    """The entry of an input or output; side: the value for its free dimensions.

    Raises ValueError for a name that no tensor in our graphs can have.
    """
    if not (isinstance(spec.name, str) and re.fullmatch(r"[A-Za-z_][A-Za-z_0-9]{0,63}", spec.name)):
        raise ValueError(f"tensor name {shown(spec.name)}: letters, digits and _ are allowed")
    value = {"name": spec.name, "data_type": _TYPES[spec.dtype]}
    if dims := [size if isinstance(size, int) else side for size in spec.shape[1:]]:
        return value | {"dims": dims}
    # One number per row: a client sends (N, 1), the graph reads (N,).
    return value | {"dims": [1], "reshape": {"shape": []}}


def _optimization(dtype: str, options: ServingOptions) -> dict[str, Any]:
    value: dict[str, Any] = {"input_pinned_memory": {"enable": True}}
    if options.platform == "tensorrt":
        return value | {"cuda": {"graphs": True}}
    if options.accelerator == "none":
        return value
    parameters = {"use_ep_level_unified_stream": "1"}
    if options.accelerator == "tensorrt":
        parameters = {
            "precision_mode": "FP32" if dtype == "fp32" else "FP16",
            "max_workspace_size_bytes": str(2**32),
            "trt_engine_cache_enable": "1",  # the first start takes minutes to build engines
            "trt_engine_cache_path": ENGINE_CACHE,
            "trt_timing_cache_enable": "1",
        }
    pairs = [{"key": key, "value": setting} for key, setting in parameters.items()]
    accelerator = {"name": options.accelerator, "parameters": pairs}
    return value | {"execution_accelerators": {"gpu_execution_accelerator": [accelerator]}}


def to_pbtxt(fields: Mapping[str, Any], indent: str = "") -> str:
    """Protocol buffers' text format. A list of messages becomes a field that repeats; a list of
    numbers is written in brackets.

    Raises ValueError for a value of any other type. So everything that is written here is a number,
    one of our own words, or a string whose quotation marks are escaped.
    """
    text = ""
    for key, value in fields.items():
        messages = isinstance(value, list) and value and isinstance(value[0], Mapping)
        for item in value if messages else [value]:
            if isinstance(item, Mapping):
                text += f"{indent}{key} {{\n{to_pbtxt(item, indent + '  ')}{indent}}}\n"
            else:
                text += f"{indent}{key}: {_scalar(item)}\n"
    return text


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    numbers = isinstance(value, list) and all(type(each) is int for each in value)
    if numbers or isinstance(value, Enum | int):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is not a value of a config.pbtxt")
    # C's escapes of UTF-8 bytes, which all programs that read these files understand.
    data = value.replace("\\", r"\\").replace('"', r"\"").encode("utf-8", "surrogatepass")
    return '"' + "".join(chr(b) if 32 <= b < 127 else f"\\{b:03o}" for b in data) + '"'
