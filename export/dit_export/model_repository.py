"""A model repository for Triton Inference Server, from an export directory.

```
dit_transformer/  vae_decoder/  dit_guided_step/   config.pbtxt, 1/model.onnx (or model.plan)
dit/                                               config.pbtxt, 1/model.py: the loop on the server
repository.json, README.md, client.py
```
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from dit_engine._version import __version__
from dit_engine.directories import Known, check_destination, new_directory, nothing_known
from dit_engine.files import file_hash
from dit_export.bundle import Bundle
from dit_export.bundle_metadata import check_metadata
from dit_export.targets import DTYPES, QUANTIZED
from dit_export.triton.configuration import GRAPHS, ServingOptions, graph_config, pipeline_config
from dit_export.triton.readme import readme

MARKER = "repository.json"
FORMAT = 2

# Copied into dit/1 as they are installed here, so that the server's loop cannot drift from ours.
SOURCES = (
    "dit_engine.arguments",
    "dit_engine.coefficients",
    "dit_engine.diffusion",
    "dit_engine.labels",
    "dit_engine.printable",
    "dit_engine.schedule",
    "dit_export.triton.pipeline",
    "dit_export.triton.sampling",
    "dit_export.triton.torch_random",
)

_ENTRY = '''"""The loop on the server. Packages beside this file: of DiT Engine {version}."""

import sys
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parent))  # before any other version installed here

from dit_export.triton.pipeline import TritonPythonModel  # noqa: E402, F401
'''


def write_repository(
    bundle: Bundle,
    directory: str | Path,
    options: ServingOptions | None = None,
    *,
    engines: str | Path | None = None,
    overwrite: bool = False,
    move: bool = False,
) -> Path:
    """Write a model repository, whole or not at all.

    Args:
        engines: for platform "tensorrt", the directory of engines built from ``bundle``.
        overwrite: replace an earlier repository; anything else in ``directory`` is refused.
        move: take the graphs' files out of the bundle, which is then no longer one.

    Raises:
        ValueError: an option out of its range, a bundle without one of the graphs, engines that do
            not fit, or a destination that holds something else. OSError: it cannot be written.
    """
    options = (options or ServingOptions()).checked()
    target = Path(directory)
    check_bundle(bundle, options)
    files = {name: _model_files(bundle, name, options, engines) for name in GRAPHS}
    with new_directory(target, replaceable(overwrite)) as partial:
        for name, sources in files.items():
            version = partial / name / "1"
            version.mkdir(parents=True)
            for file, source in sources.items():
                (shutil.move if move else shutil.copyfile)(source, version / file)
            _write(partial / name / "config.pbtxt", graph_config(name, bundle, options))
        _write_pipeline(partial / "dit", bundle, options)
        _write(partial / "README.md", readme(bundle, options))
        _write(partial / "client.py", source_of("dit_export.triton.client"))
        marker = {
            "format": FORMAT,
            "producer": f"dit-engine {__version__}",
            "checkpoint": bundle.checkpoint,
            "dtype": bundle.dtype,
            "platform": options.platform,
            "models": [*GRAPHS, "dit"],
            "files": {
                file.relative_to(partial).as_posix(): file_hash(file)
                for file in sorted(partial.rglob("*"))
                if not file.is_dir()
            },
        }
        _write(partial / MARKER, json.dumps(marker, indent=2) + "\n")
    return target


def check_bundle(bundle: Bundle, options: ServingOptions) -> None:
    """Raises ValueError unless everything that a repository needs is there, and of one model."""
    if bundle.vae is None:
        raise ValueError(f"{bundle.path}: has no VAE, and a server of images needs one")
    check_dtypes([bundle.graph(graph).dtype for graph in GRAPHS.values()], options)
    for graph in GRAPHS.values():
        check_metadata(bundle, graph)


def check_dtypes(dtypes: Iterable[str], options: ServingOptions) -> None:
    """Raises ValueError for a graph's number format that the platform does not run."""
    if options.platform != "onnxruntime":
        return
    for dtype in dtypes:
        if dtype == "bf16":
            allowed = ", ".join(name for name in DTYPES if name != dtype)
            raise ValueError(
                f"{dtype} graphs are not served: the server's onnxruntime has no operators for "
                f"them; choose one of {allowed}, or --platform tensorrt"
            )
        if dtype in QUANTIZED and options.accelerator == "tensorrt":
            raise ValueError(
                f"accelerator 'tensorrt': onnxruntime's does not take {dtype} graphs; choose "
                "cuda or none, or --platform tensorrt"
            )


def check_free(directory: str | Path, overwrite: bool) -> None:
    """Raises ValueError, before any work, where `write_repository` would refuse to write."""
    check_destination(Path(directory), replaceable(overwrite))


def read_marker(path: Path) -> dict[str, Any]:
    """Raises a one-line ValueError for what is no repository of ours."""
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no model repository; {MARKER} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path / MARKER}: no JSON: {error}") from None
    ours = isinstance(marker, dict) and isinstance(marker.get("files"), dict)
    if not ours or marker.get("format") != FORMAT:
        raise ValueError(f"{path / MARKER}: not written by this version of dit-export")
    return marker


def replaceable(overwrite: bool) -> Known:
    """For `new_directory`: only an earlier repository may be replaced, if that was asked."""

    def known(path: Path) -> Mapping[str, str | None]:
        try:
            marker = read_marker(path)
        except ValueError:
            return nothing_known(path)
        if not overwrite:
            raise ValueError("holds a model repository; --overwrite replaces it")
        listed = marker["files"]
        return {MARKER: None} | {n: str(listed[n]) for n in file_names() if n in listed}

    return known


def file_names() -> list[str]:
    """Every file that a repository may hold beside `MARKER`."""
    names = ["README.md", "client.py", *(f"dit/{name}" for name in _pipeline_names())]
    for model, graph in GRAPHS.items():
        files = ("model.onnx", f"{graph}.onnx.data", "model.plan")
        names += [f"{model}/config.pbtxt", *(f"{model}/1/{file}" for file in files)]
    return names


def _pipeline_names() -> list[str]:
    names = ["config.pbtxt", "1/model.py", "1/pipeline.json"]
    for module in SOURCES:
        path = PurePosixPath("1", *module.split("."))
        names += [f"{path}.py", *(f"{parent}/__init__.py" for parent in path.parents[:-2])]
    return list(dict.fromkeys(names))


def source_of(module: str) -> str:
    """The source text of an installed module."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def _model_files(
    bundle: Bundle, name: str, options: ServingOptions, engines: str | Path | None
) -> dict[str, Path]:
    """Name in the version's directory → the file to put there."""
    graph = bundle.file(GRAPHS[name])
    if options.platform == "onnxruntime":
        # The graph names its file of weights, which must lie beside it under the same name.
        weights = graph.with_name(f"{graph.name}.data")
        return {"model.onnx": graph} | ({weights.name: weights} if weights.is_file() else {})
    if engines is None:
        raise ValueError("platform 'tensorrt' needs --engines, the directory of built engines")
    from dit_export.triton.plans import find_plan

    return {"model.plan": find_plan(Path(engines), bundle, GRAPHS[name], options.max_batch_size)}


def _write_pipeline(folder: Path, bundle: Bundle, options: ServingOptions) -> None:
    from dit_engine.sampler import SAMPLERS

    version = folder / "1"
    for module in SOURCES:
        *parents, name = module.split(".")
        package = version
        for parent in parents:
            package = package / parent
            package.mkdir(parents=True, exist_ok=True)
            _write(package / "__init__.py", '"""Parts of DiT Engine."""\n')
        _write(package / f"{name}.py", source_of(module))
    config = bundle.config
    facts = {
        "shape": [config.in_channels, config.input_size, config.input_size],
        "learn_sigma": config.learn_sigma,
        "num_classes": config.num_classes,
        "label_names": None if bundle.label_names is None else list(bundle.label_names),
        "samplers": {name: [s.default_steps, s.spacing] for name, s in SAMPLERS.items()},
        "diffusion": config.diffusion.to_dict(),
    }
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    _write(version / "pipeline.json", text)
    _write(version / "model.py", _ENTRY.format(version=__version__))
    _write(folder / "config.pbtxt", pipeline_config(bundle, options))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
