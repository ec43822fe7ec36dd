"""The README.md of a model repository: repository_readme.md with the facts of an export."""

from __future__ import annotations

import shlex
from pathlib import Path

from dit_engine.io.printable import markdown_text, printable
from dit_export.bundle import Bundle
from dit_export.server.configuration import ServingOptions
from dit_export.source import model_name

_ONNX_NEEDS = """\
Its onnxruntime must know ONNX opset {opset} (1.23 knows 23; the release notes name the version).
Up to 1.24 it computes opset 23's Attention on the CPU even if there is a GPU:
`dit-export triton --opset 22` writes graphs without it."""
_PLAN_NEEDS = """\
Engines load only in the TensorRT version that built them: take the release whose notes name it."""


def readme(bundle: Bundle, options: ServingOptions) -> str:
    config, vae, names = bundle.config, bundle.vae, bundle.label_names
    assert vae is not None
    onnx = options.platform == "onnxruntime"
    said, arguments = "this model has none", ["0", "1"]
    if names is not None:
        said = ", ".join(markdown_text(name.split(",")[0]) for name in names[:4])
        said += f" … ({len(names)} in all)" if len(names) > 4 else ""
        arguments = list(map(_argument, range(2), names))
    template = Path(__file__).with_name("repository_readme.md").read_text(encoding="utf-8")
    return template.format(
        model=model_name(config),
        pixels=config.input_size * vae.downsampling,
        platform="ONNX" if onnx else "TensorRT engines",
        dtype=bundle.dtype,
        guided=f"the first {bundle.guided_channels} of {config.in_channels}",
        batch=options.max_batch_size,
        last=config.num_classes - 1,
        train_steps=config.diffusion.num_train_steps,
        names=said,
        gpu=" (without a GPU, leave out `--gpus all`)" if onnx else "",
        needs=_ONNX_NEEDS.format(opset=bundle.opset) if onnx else _PLAN_NEEDS,
        example=" ".join(arguments),
    )


def _argument(number: int, name: str) -> str:
    """A label as an argument in a shell command: quoted, or as its number if its name could end the
    block of code or be taken for an option."""
    plain = name == printable(name) and name.strip() and "`" not in name and name[0] != "-"
    return shlex.quote(name) if plain else str(number)
