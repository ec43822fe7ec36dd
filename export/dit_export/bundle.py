"""An export directory: ONNX graphs and the manifest that says what they are.

``manifest.json`` is written last, and lists every other file with its size and SHA-256.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dit_engine._version import __version__
from dit_engine.arguments import shown
from dit_engine.config import ModelConfig
from dit_engine.io.directories import Known, nothing_known
from dit_engine.io.files import check_regular, file_hash
from dit_engine.io.json_files import check_schema, read_json_value
from dit_engine.vae import VAEConfig
from dit_export.targets import DTYPES, GRAPHS, TARGETS

FORMAT = 1
MANIFEST = "manifest.json"
LABELS = "labels.json"

FILES = (*(f"{graph}.onnx{suffix}" for graph in GRAPHS for suffix in ("", ".data")), LABELS)
"""Every file that an export may hold, except its manifest."""

# The manifest's schema, in the language of `dit_engine.io.json_files`.
_TENSOR = {"name": "line", "dtype": ("float32", "int64"), "shape": "count|line[]"}
SCHEMA = {
    "": {
        "producer": "line", "model": "object", "vae": "object?", "checkpoint": "line",
        "vae_checkpoint?": "line?", "dtype": DTYPES, "opset": "count", "target": TARGETS,
        "guided_channels": "count", "label_names": "text[]?", "graphs": "object", "files": "object",
    },
    "graphs": {"<file name>": "object"},
    "graphs{}": {
        "file": "file name", "dtype": DTYPES, "inputs": "list", "outputs": "list",
        "error?": "object?", "verified_by?": "line[]",
    },
    "graphs{}.inputs[]": _TENSOR,
    "graphs{}.outputs[]": _TENSOR,
    "files": {"<file name>": "object"},
    "files{}": {"bytes": "count", "sha256": "line"},
}  # fmt: skip


class ExportFailed(ValueError):
    """A graph was made but is not what was asked for; the one-line message names the graph."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph. A dimension that is given as a name may have any size."""

    name: str
    dtype: str  # "float32" or "int64"
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """One ONNX file of a bundle.

    Attributes:
        dtype: of the graph's arithmetic. Its inputs and outputs are always float32 or int64.
        error: {"against", "relative", "bound"} of the run after the export; "relative" is
            max |graph − torch| / max |torch|.
        verified_by: the programs that checked the graph after the export.
    """

    name: str
    file: str
    dtype: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    error: dict[str, Any] | None = None
    verified_by: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, name: str, values: dict[str, Any]) -> Graph:
        inputs, outputs = (
            tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in values[key])
            for key in ("inputs", "outputs")
        )
        more = (values.get("error"), tuple(values.get("verified_by", ())))
        return cls(name, values["file"], values["dtype"], inputs, outputs, *more)


@dataclass(frozen=True)
class Bundle:
    """An export directory that has been read and, by default, checked.

    dtype and target are what was asked for, the checkpoints are `dit_export.source.weights_hash` of
    the transformer and the VAE, and guided_channels is how many latent channels ``guided_step``
    guides.
    """

    path: Path
    config: ModelConfig
    vae: VAEConfig | None
    label_names: tuple[str, ...] | None
    dtype: str
    opset: int
    target: str
    checkpoint: str
    vae_checkpoint: str | None
    guided_channels: int
    graphs: dict[str, Graph]
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> Bundle:
        """Read the export at ``path``; verify: compare every file with its SHA-256.

        Raises a one-line ValueError that names the directory or file if it is not an export, has
        the format of another version, or if a file is missing or has changed.
        """
        path = Path(path)
        manifest = _of_this_format(path)
        check_schema(manifest, SCHEMA, path / MANIFEST)
        try:
            bundle = cls.from_manifest(path, manifest)
        except (ValueError, TypeError) as error:  # of a config
            raise ValueError(f"{path / MANIFEST}: cannot be read: {error}") from None
        for graph in bundle.graphs.values():
            if graph.file not in manifest["files"]:
                raise ValueError(f"{path / MANIFEST}: {graph.file} is not among the files")
        for name, listed in manifest["files"].items() if verify else ():
            file = path / name
            check_regular(file)
            if file_hash(file) != listed["sha256"]:
                raise ValueError(f"{file}: has changed since the export (SHA-256 differs)")
        return bundle

    @classmethod
    def from_manifest(cls, path: Path, manifest: dict[str, Any]) -> Bundle:
        """The bundle that a manifest describes, without reading the files at ``path``.

        The manifest must fit `SCHEMA`. Raises ValueError or TypeError for an invalid config, and
        ValueError for files that an export cannot have.
        """
        names, vae = manifest["label_names"], manifest["vae"]
        config = ModelConfig.from_dict(manifest["model"])
        if names is not None and len(names) != config.num_classes:
            raise ValueError(f"{len(names)} label names for {config.num_classes} classes")
        graphs = {name: Graph.from_dict(name, g) for name, g in manifest["graphs"].items()}
        foreign = [name for name in manifest["files"] if name not in FILES]
        foreign += [g.file for g in graphs.values() if g.file != f"{g.name}.onnx"]
        if foreign:
            raise ValueError(f"file {shown(foreign[0])} is not a file of an export")
        same = ("dtype", "opset", "target", "checkpoint", "guided_channels")
        return cls(
            path=path,
            config=config,
            vae=None if vae is None else VAEConfig.from_dict(vae),
            label_names=None if names is None else tuple(names),
            vae_checkpoint=manifest.get("vae_checkpoint"),
            graphs=graphs,
            manifest=manifest,
            **{key: manifest[key] for key in same},
        )

    def graph(self, name: str) -> Graph:
        """The graph ``name``. Raises ValueError, which lists the graphs that there are."""
        if name not in self.graphs:
            raise ValueError(f"{self.path}: no graph {name!r}; it holds {', '.join(self.graphs)}")
        return self.graphs[name]

    def file(self, name: str) -> Path:
        """The ONNX file of graph ``name``; its weights may be in a file beside it."""
        return self.path / self.graph(name).file


def _of_this_format(path: Path) -> dict[str, Any]:
    """The manifest of an export, of which only the producer and the format have been checked."""
    try:
        manifest = read_json_value(path / MANIFEST)
    except FileNotFoundError:
        raise ValueError(f"{path}: not an export; {MANIFEST} is missing") from None
    if not _by_us(manifest) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{path / MANIFEST}: not written by dit-export")
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path / MANIFEST}: format {shown(manifest.get('format'))}; {FORMAT} is what is read"
        )
    return manifest


def _by_us(manifest: Any) -> bool:
    return isinstance(manifest, dict) and str(manifest.get("producer")).startswith("dit-engine")


def write_manifest(directory: Path, values: dict[str, Any], graphs: list[Graph]) -> None:
    """Write ``manifest.json`` for the files in ``directory``; it must be the last file written."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": file_hash(file)}
        for file in sorted(directory.iterdir())
    }
    described = {graph.name: asdict(graph) for graph in graphs}
    for graph in described.values():
        del graph["name"]
    version = {"format": FORMAT, "producer": f"dit-engine {__version__}"}
    text = json.dumps(
        version | values | {"graphs": described, "files": files}, indent=2, ensure_ascii=False
    )
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def replaceable(overwrite: bool) -> Known:
    """A `Known` for `new_directory`: only an earlier export may be replaced, with overwrite."""

    def known(path: Path) -> Mapping[str, str | None]:
        try:
            files = _of_this_format(path)["files"]
        except ValueError:
            refuse_another_version(path / MANIFEST, FORMAT, "an export")
            return nothing_known(path)
        if not overwrite:
            raise ValueError("holds an export already; --overwrite replaces it")
        ours = {n: facts for n, facts in files.items() if n in FILES and isinstance(facts, dict)}
        return {MANIFEST: None} | {name: str(facts.get("sha256")) for name, facts in ours.items()}

    return known


def refuse_another_version(path: Path, version: int, what: str) -> None:
    """Raise ValueError if another version of dit-export wrote this manifest."""
    try:
        values = read_json_value(path)
    except (OSError, ValueError):
        return
    if _by_us(values) and values.get("format") != version:
        raise ValueError(f"holds {what} of another version: remove it, or choose another -o")
