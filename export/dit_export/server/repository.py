"""A model repository for Triton Inference Server: the files that it holds, and how it is written.

```
dit_transformer/  vae_decoder/  dit_guided_step/   config.pbtxt, 1/model.onnx (or model.plan)
dit/                                               config.pbtxt, 1/model.py: the loop on the server
repository.json, README.md, client.py
```

Every file except the graphs is generated from the facts in repository.json, so that
`dit_export.server.trust` can generate it again and compare.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from dit_engine._version import __version__
from dit_engine.io.directories import Known, new_directory, nothing_known
from dit_engine.io.files import check_regular, file_hash
from dit_engine.io.json_files import check_schema, read_json_value
from dit_engine.io.printable import markdown_text, printable
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
from dit_export.server.sources import EARLIER, LOOP, LOOP_ENTRY, packages, source_of, write_text
from dit_export.source import model_name
from dit_export.targets import DTYPES, QUANTIZED

MARKER = "repository.json"
PRODUCER = f"dit-engine {__version__}"
TRUST = "write the repository again elsewhere, or look at what is there and serve it with --trust"
FORMAT = 2  # format 1 had no hashes, and lacked facts that the configurations are made from

# The schema of repository.json, for `dit_engine.io.json_files`. Its entry "export" is checked by
# the schema of an export's manifest.
SCHEMA = {
    "": {"producer": "text", "options": "object", "export": "object", "files": "object"},
    "options": {
        "platform": PLATFORMS, "accelerator": ACCELERATORS, "max_batch_size": "count",
        "instances": "count", "pipelines": "count", "queue_delay_us": "count",
        "queue_size": "count",
    },
    "files": {"<text>": "text"},
}  # fmt: skip

ONNX_FILES = {f"{model}/1/model.onnx": f"{graph}.onnx" for model, graph in GRAPHS.items()}
"""File in the repository → file in the export."""
WEIGHTS = {f"{m}/1/{graph}.onnx.data": f"{graph}.onnx.data" for m, graph in GRAPHS.items()}
"""The same for files of weights, which only large graphs have. A graph holds the name of its file
of weights, so that name cannot be changed here."""
PLANS = {f"{model}/1/model.plan": graph for model, graph in GRAPHS.items()}
"""File in the repository → graph of which it is the TensorRT engine."""


_ONNX_NEEDS = """\
Its onnxruntime must know ONNX opset {opset} (1.23 knows 23; the release notes name the version).
Up to 1.24 it computes opset 23's Attention on the CPU even if there is a GPU:
`dit-export triton --opset 22` writes graphs without it."""
_PLAN_NEEDS = """\
Engines load only in the TensorRT version that built them: take the release whose notes name it."""


def write_repository(
    bundle: Bundle,
    directory: str | Path,
    options: ServingOptions | None = None,
    *,
    engines: str | Path | None = None,
    overwrite: bool = False,
    move: bool = False,
) -> Path:
    """Write a model repository, complete or not at all.

    Args:
        engines: for platform "tensorrt", the directory of engines built from ``bundle``.
        overwrite: replace an earlier repository. Anything else in ``directory`` is refused.
        move: move the graphs' files out of the bundle, which is unusable afterwards.

    Raises ValueError for an option out of its range, a bundle or an engine that does not fit, and a
    destination that holds something else.
    """
    options = (options or ServingOptions()).checked()
    target = Path(directory)
    if bundle.vae is None:
        raise ValueError(f"{bundle.path}: has no VAE, and a server of images needs one")
    check_dtypes([bundle.graph(graph).dtype for graph in GRAPHS.values()], options)
    for graph in GRAPHS.values():
        check_metadata(bundle, graph)
    data = _graph_files(bundle, options, engines)
    texts = repository_texts(bundle, options)
    with new_directory(target, replaceable(overwrite)) as partial:
        for name, text in texts.items():
            write_text(partial / name, text)
        for name, (source, digest) in data.items():
            check_regular(source)
            (partial / name).parent.mkdir(exist_ok=True)
            (shutil.move if move else shutil.copyfile)(source, partial / name)
            if not move and file_hash(partial / name) != digest:  # the hash of the copy itself
                raise ValueError(f"{source}: has changed since it was checked")
        hashes = {name: sha256(text.encode()).hexdigest() for name, text in texts.items()}
        hashes |= {name: digest for name, (_, digest) in data.items()}
        write_text(partial / MARKER, _marker(hashes, bundle, options))
    return target


def check_dtypes(dtypes: Iterable[str], options: ServingOptions) -> None:
    """Raise ValueError for a graph's number format that the platform does not run."""
    if options.platform == "tensorrt":
        return
    refused = ["bf16", *(QUANTIZED if options.accelerator == "tensorrt" else ())]
    allowed = ", ".join(name for name in DTYPES if name not in refused)
    for dtype in dtypes:
        if dtype in refused:
            raise ValueError(
                f"{dtype} graphs are not served by onnxruntime with accelerator "
                f"{options.accelerator!r}: choose one of {allowed}, or --platform tensorrt"
            )


def _graph_files(
    bundle: Bundle, options: ServingOptions, engines: str | Path | None
) -> dict[str, tuple[Path, str]]:
    """Name in the repository → the file to put there, and its SHA-256."""
    if options.platform == "onnxruntime":
        listed = bundle.manifest["files"]
        names = {name: file for name, file in (ONNX_FILES | WEIGHTS).items() if file in listed}
        return {n: (bundle.path / file, listed[file]["sha256"]) for n, file in names.items()}
    if engines is None:
        raise ValueError("platform 'tensorrt' needs --engines, the directory of built engines")
    most, folder = options.max_batch_size, Path(engines)
    return {name: find_plan(folder, bundle, graph, most) for name, graph in PLANS.items()}


def find_plan(directory: Path, bundle: Bundle, graph: str, max_batch_size: int) -> tuple[Path, str]:
    """The newest engine of ``graph`` in ``directory`` that a server's "tensorrt_plan" can load and
    that takes batches of 1 to ``max_batch_size``; and its SHA-256.

    Raises ValueError if there is none, which says what the newest engine is for.
    """
    from dit_export.tensorrt.build import graph_hash
    from dit_export.tensorrt.engine_files import find_engines

    checkpoint = bundle.vae_checkpoint if graph == "vae_decoder" else bundle.checkpoint
    engines = find_engines(directory, graph, checkpoint=checkpoint)
    wanted, side = graph_hash(bundle, graph), bundle.config.input_size
    for engine in engines:
        key, profile = engine.key, engine.key.profiles[0]  # the server takes the first
        fits = key.graph == wanted and key.flavour == "tensorrt"
        batches = profile.batch.smallest == 1 and max_batch_size <= profile.batch.largest
        if fits and batches and (profile.size is None or side in profile.size):
            if file_hash(engine.path) != engine.sha256:
                raise ValueError(f"{engine.path}: has changed since it was built (SHA-256 differs)")
            return engine.path, engine.sha256
    newest, key = engines[0].path, engines[0].key
    export = "this export" if key.graph == wanted else "another export"
    raise ValueError(
        f"{newest}: was built from {export} for {key.flavour}, {key.profiles[0]}; the server needs "
        f"this export's for tensorrt, batches of 1 to {max_batch_size} and latents of size {side}"
    )


def repository_texts(bundle: Bundle, options: ServingOptions) -> dict[str, str]:
    """The generated files of a repository: path, with "/" → content.

    They depend only on the facts about ``bundle`` that repository.json holds, not on its files.
    """
    from dit_engine.sampling.samplers import SAMPLERS

    config = bundle.config
    facts = {  # `dit_export.server.pipeline` reads them
        "shape": [config.in_channels, config.input_size, config.input_size],
        "learn_sigma": config.learn_sigma,
        "num_classes": config.num_classes,
        "label_names": None if bundle.label_names is None else list(bundle.label_names),
        "samplers": {name: [s.default_steps, s.spacing] for name, s in SAMPLERS.items()},
        "diffusion": config.diffusion.to_dict(),
    }
    return {
        **{f"{name}/config.pbtxt": graph_config(name, bundle, options) for name in GRAPHS},
        "dit/config.pbtxt": pipeline_config(bundle, options),
        "dit/1/model.py": LOOP_ENTRY,
        "dit/1/pipeline.json": _json(facts),
        **{f"dit/1/{name}": text for name, text in packages(LOOP).items()},
        "README.md": readme(bundle, options),
        "client.py": source_of("dit_export.server.client"),
    }


def readme(bundle: Bundle, options: ServingOptions) -> str:
    """README.md of a repository: repository_readme.md with the facts of an export."""
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


def _marker(hashes: dict[str, str], bundle: Bundle, options: ServingOptions) -> str:
    """The content of repository.json; hashes: the SHA-256 of every other file.

    Its entry "export" is the part of the bundle's manifest that the generated files depend on.
    """
    graphs = {graph: bundle.manifest["graphs"][graph] for graph in GRAPHS.values()}
    return _json({
        "format": FORMAT,
        "producer": PRODUCER,
        "checkpoint": bundle.checkpoint,
        "dtype": bundle.dtype,
        "platform": options.platform,
        "models": [*GRAPHS, "dit"],
        "options": asdict(options),
        "export": {**bundle.manifest, "graphs": graphs, "files": {}},
        "files": dict(sorted(hashes.items())),
    })  # fmt: skip


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def check_marker(path: Path) -> None:
    """Raise ValueError if there is no repository.json."""
    if not (path / MARKER).is_file():
        raise ValueError(f"{path}: not a model repository; {MARKER} is missing")


def read_marker(path: Path) -> dict[str, Any]:
    """The content of repository.json. Raises a one-line ValueError if it is not one of ours."""
    check_marker(path)
    marker = read_json_value(path / MARKER)
    ours = isinstance(marker, dict) and isinstance(marker.get("files"), dict)
    if not ours or marker.get("format") != FORMAT:
        raise ValueError(f"{path / MARKER}: not written by this version of dit-export: {TRUST}")
    check_schema(marker, SCHEMA, f"{path / MARKER}: cannot be read")
    return marker


def replaceable(overwrite: bool) -> Known:
    """A `Known` for `new_directory`: only an earlier repository may be replaced, with overwrite."""

    def known(path: Path) -> Mapping[str, str | None]:
        try:
            listed = read_marker(path)["files"]
        except ValueError:
            refuse_another_version(path / MARKER, FORMAT, "a model repository")
            return nothing_known(path)
        if not overwrite:
            raise ValueError("holds a model repository; --overwrite replaces it")
        modules = [f"{module.replace('.', '/')}.py" for module in EARLIER]
        names = ["README.md", "client.py", "dit/config.pbtxt", *ONNX_FILES, *WEIGHTS, *PLANS]
        names += [f"{model}/config.pbtxt" for model in GRAPHS]
        names += [f"dit/1/{n}" for n in ("model.py", "pipeline.json", *packages(LOOP), *modules)]
        return {MARKER: None} | {name: listed[name] for name in names if name in listed}

    return known
