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
from dataclasses import asdict
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dit_engine._version import __version__
from dit_engine.io.directories import Known, check_destination, new_directory, nothing_known
from dit_engine.io.files import check_regular, file_hash
from dit_engine.io.json_files import check_schema, read_json_value
from dit_export.bundle import Bundle, refuse_another_version
from dit_export.onnx.files import check_metadata
from dit_export.server.configuration import (
    ACCELERATORS,
    GRAPHS,
    PLATFORMS,
    ServingOptions,
    graph_config,
    pipeline_config,
)
from dit_export.server.readme import readme
from dit_export.targets import DTYPES, QUANTIZED

MARKER = "repository.json"
PRODUCER = f"dit-engine {__version__}"
TRUST = (
    "write the repository again to another directory, or look at its code and serve it with --trust"
)
FORMAT = 2  # 1 had no hashes, and did not say what the configurations are made from

# Of repository.json, in the language of `dit_engine.io.json_files`; "export" is an export's
# manifest.
SCHEMA = {
    "": {"producer": "text", "options": "object", "export": "object", "files": "object"},
    "options": {
        "platform": PLATFORMS, "accelerator": ACCELERATORS, "max_batch_size": "count",
        "instances": "count", "pipelines": "count", "queue_delay_us": "count",
        "queue_size": "count",
    },
    "files": {"<text>": "text"},
}  # fmt: skip

# Copied into dit/1 as they are installed here, so that the server's loop cannot drift from ours.
SOURCES = (
    "dit_engine.arguments",
    "dit_engine.sampling.coefficients",
    "dit_engine.sampling.diffusion",
    "dit_engine.labels",
    "dit_engine.io.printable",
    "dit_engine.sampling.schedule",
    "dit_export.server.origin",
    "dit_export.server.pipeline",
    "dit_export.server.sampling",
    "dit_export.server.torch_random",
)

_ENTRY = '''"""The loop on the server. Packages beside this file: of DiT Engine {version}."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # before any other version installed here

from dit_export.server.pipeline import TritonPythonModel  # noqa: E402, F401
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
        move: move the graphs' files out of the bundle, which is unusable afterwards.

    Raises:
        ValueError: an option out of its range, a bundle without one of the graphs, engines that do
            not fit, or a destination that holds something else. OSError: it cannot be written.
    """
    options = (options or ServingOptions()).checked()
    target = Path(directory)
    check_bundle(bundle, options)
    data = _data_files(bundle, options, engines)
    texts = repository_texts(bundle, options)
    with new_directory(target, replaceable(overwrite)) as partial:
        for name, text in texts.items():
            write_text(partial / name, text)
        for name, (source, digest) in data.items():
            check_regular(source)
            (partial / name).parent.mkdir(exist_ok=True)
            (shutil.move if move else shutil.copyfile)(source, partial / name)
            if not move and file_hash(partial / name) != digest:  # of the copy itself
                raise ValueError(f"{source}: has changed since it was checked")
        hashes = {name: sha256(text.encode()).hexdigest() for name, text in texts.items()}
        hashes |= {name: digest for name, (_, digest) in data.items()}
        write_text(partial / MARKER, _marker(hashes, bundle, options))
    return target


def repository_texts(bundle: Bundle, options: ServingOptions) -> dict[str, str]:
    """Path of every generated file of a repository, with "/" → its content. Only the facts that
    repository.json records of ``bundle`` are used, not its files."""
    return {
        **{f"{name}/config.pbtxt": graph_config(name, bundle, options) for name in GRAPHS},
        "dit/config.pbtxt": pipeline_config(bundle, options),
        "dit/1/model.py": _ENTRY.format(version=__version__),
        "dit/1/pipeline.json": _pipeline_facts(bundle),
        **{f"dit/1/{name}": text for name, text in packages(SOURCES).items()},
        "README.md": readme(bundle, options),
        "client.py": source_of("dit_export.server.client"),
    }


def _marker(hashes: dict[str, str], bundle: Bundle, options: ServingOptions) -> str:
    """The content of repository.json. Its entry "export" has the part of the bundle's manifest from
    which the other files are generated; hashes: SHA-256 of every other file."""
    marker = {
        "format": FORMAT,
        "producer": PRODUCER,
        "checkpoint": bundle.checkpoint,
        "dtype": bundle.dtype,
        "platform": options.platform,
        "models": [*GRAPHS, "dit"],
        "options": asdict(options),
        "export": {
            **bundle.manifest,
            "graphs": {graph: bundle.manifest["graphs"][graph] for graph in GRAPHS.values()},
            "files": {},
        },
        "files": dict(sorted(hashes.items())),
    }
    return json.dumps(marker, indent=2, ensure_ascii=False) + "\n"


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


def check_marker(path: Path) -> None:
    """Raises ValueError if there is no repository.json."""
    if not (path / MARKER).is_file():
        raise _no_repository(path)


def _no_repository(path: Path) -> ValueError:
    return ValueError(f"{path}: not a model repository; {MARKER} is missing")


def read_marker(path: Path) -> dict[str, Any]:
    """The content of repository.json. Raises a one-line ValueError if it is not one of ours."""
    try:
        marker = read_json_value(path / MARKER)
    except FileNotFoundError:
        raise _no_repository(path) from None
    ours = isinstance(marker, dict) and isinstance(marker.get("files"), dict)
    if not ours or marker.get("format") != FORMAT:
        raise ValueError(f"{path / MARKER}: not written by this version of dit-export: {TRUST}")
    check_schema(marker, SCHEMA, f"{path / MARKER}: cannot be read")
    return marker


def replaceable(overwrite: bool) -> Known:
    """A `Known` for `new_directory`: only an earlier repository may be replaced, with overwrite."""

    def known(path: Path) -> Mapping[str, str | None]:
        try:
            marker = read_marker(path)
        except ValueError:
            refuse_another_version(path / MARKER, FORMAT, "a model repository")
            return nothing_known(path)
        if not overwrite:
            raise ValueError("holds a model repository; --overwrite replaces it")
        listed = marker["files"]
        return {MARKER: None} | {n: listed[n] for n in file_names() if n in listed}

    return known


def file_names() -> list[str]:
    """Every file that a repository may hold, except `MARKER`."""
    names = ["README.md", "client.py", "dit/config.pbtxt", "dit/1/model.py", "dit/1/pipeline.json"]
    names += [f"dit/1/{name}" for name in packages(SOURCES)]
    for platform in PLATFORMS:
        names += [*data_names(platform)[0], *data_names(platform)[1]]
    return [*names, *(f"{model}/config.pbtxt" for model in GRAPHS)]


def source_of(module: str) -> str:
    """The source text of an installed module."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def data_names(platform: str) -> tuple[list[str], list[str]]:
    """Names of the graphs' files in the repository, in the order of `GRAPHS`: those that are always
    there, and the files of weights, which only some graphs have. A graph holds the name of its file
    of weights, so that name cannot be changed here."""
    if platform == "tensorrt":
        return [f"{name}/1/model.plan" for name in GRAPHS], []
    weights = [f"{name}/1/{graph}.onnx.data" for name, graph in GRAPHS.items()]
    return [f"{name}/1/model.onnx" for name in GRAPHS], weights


def _data_files(
    bundle: Bundle, options: ServingOptions, engines: str | Path | None
) -> dict[str, tuple[Path, str]]:
    """Name in the repository → the file to put there, and its SHA-256."""
    names, weights = data_names(options.platform)
    files: dict[str, tuple[Path, str]] = {}
    if options.platform == "onnxruntime":
        listed = bundle.manifest["files"]
        for graph, name, data in zip(GRAPHS.values(), names, weights, strict=True):
            file = bundle.graph(graph).file
            files[name] = bundle.path / file, listed[file]["sha256"]
            if f"{file}.data" in listed:
                files[data] = bundle.path / f"{file}.data", listed[f"{file}.data"]["sha256"]
        return files
    if engines is None:
        raise ValueError("platform 'tensorrt' needs --engines, the directory of built engines")
    from dit_export.server.plans import find_plan

    for graph, name in zip(GRAPHS.values(), names, strict=True):
        plan = find_plan(Path(engines), bundle, graph, options.max_batch_size)
        files[name] = plan.path, plan.sha256
    return files


def packages(modules: Iterable[str]) -> dict[str, str]:
    """The files of packages that hold only these installed modules: path → content."""
    texts = {}
    for module in modules:
        *parents, name = module.split(".")
        for i in range(len(parents)):
            texts["/".join([*parents[: i + 1], "__init__.py"])] = '"""Parts of DiT Engine."""\n'
        texts["/".join([*parents, f"{name}.py"])] = source_of(module)
    return texts


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())  # bytes, so that Windows does not change the ends of lines


def _pipeline_facts(bundle: Bundle) -> str:
    """The content of pipeline.json."""
    from dit_engine.sampling.samplers import SAMPLERS

    config = bundle.config
    facts = {
        "shape": [config.in_channels, config.input_size, config.input_size],
        "learn_sigma": config.learn_sigma,
        "num_classes": config.num_classes,
        "label_names": None if bundle.label_names is None else list(bundle.label_names),
        "samplers": {name: [s.default_steps, s.spacing] for name, s in SAMPLERS.items()},
        "diffusion": config.diffusion.to_dict(),
    }
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
