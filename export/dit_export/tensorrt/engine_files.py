"""Engine files: a TensorRT engine with a JSON file beside it that says what it was built from.

An engine runs only where its key fits: with the same flavour and version of TensorRT, and on a
device that it was built for. The key's digest is part of the file's name, so that engines of
several versions can be in one directory.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dit_engine.arguments import shown
from dit_engine.io.files import atomic_path, check_regular, locked
from dit_engine.io.json_files import check_schema, read_json
from dit_export.tensorrt.installed import CudaDevice
from dit_export.tensorrt.profiles import Profile, Profiles

FORMAT = 2
SUFFIX = ".engine"
_SCHEMA = {
    "": {
        "graph": "line", "checkpoint": "line", "dtype": "line", "model": "object", "key": "object",
        "inputs": "object", "outputs": "object", "engine": "object",
    },
    "key": {
        "graph": "line", "flavour": "line", "version": "line", "target": "line",
        "profiles": "list", "workspace_bytes": "count", "plugins": "line[]",
    },
    "key.profiles[]": {"batch": "count[]", "size": "count[]?"},
    "inputs": {"<line>": "integer[]"},
    "outputs": {"<line>": "integer[]"},
    "engine": {"bytes": "count", "sha256": "line"},
}  # fmt: skip
REBUILD = "; build it again with dit-export tensorrt --rebuild, or with DIT_TENSORRT_REBUILD=1"


class EngineRefused(ValueError):
    """An engine file that must not be used here; the message says why and how to get another."""


@dataclass(frozen=True)
class EngineKey:
    """Everything that an engine depends on.

    Attributes:
        graph: SHA-256 of the ONNX graph with its weights.
        flavour, version: of TensorRT (`Flavour`).
        target: the devices it runs on: "NVIDIA H200 (9.0)", compute capabilities such as
            "8.9 12.0", or "any" for every one that TensorRT for RTX knows.
        profiles: in the order in which they are in the engine.
        workspace_bytes: what layers may use beside inputs, outputs and weights; 0 is no limit.
        plugins: always empty. An earlier release could put an operator of its own into engines.
    """

    graph: str
    flavour: str
    version: str
    target: str
    profiles: Profiles
    workspace_bytes: int = 0
    plugins: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"profiles": [profile.to_dict() for profile in self.profiles]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineKey:
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            raise ValueError(f"key {shown(sorted(values))}; {sorted(known)} is needed")
        profiles = tuple(Profile.from_dict(profile) for profile in values["profiles"])
        if not profiles:
            raise ValueError("profiles [] is empty")
        return cls(**values | {"profiles": profiles, "plugins": tuple(values["plugins"])})

    @property
    def digest(self) -> str:
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class EngineFile:
    """An engine on disk.

    Attributes:
        graph: which graph of an export it is, such as "denoiser".
        checkpoint: SHA-256 of the weights from which the export was made.
        dtype: of the graph.
        inputs, outputs: name → shape, with -1 for free dimensions.
        sha256, bytes: of the engine.
        model: the transformer's config, because the same weights may be used with another.
    """

    path: Path
    graph: str
    checkpoint: str
    dtype: str
    key: EngineKey
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]
    sha256: str
    bytes: int
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def description(self) -> Path:
        return description_path(self.path)

    def check(self, flavour: str, version: str, device: CudaDevice | None = None) -> None:
        """Raise `EngineRefused` unless this TensorRT can run it (on ``device``)."""
        built, here = f"{self.key.flavour} {self.key.version}", f"{flavour} {version}"
        if built != here:
            raise EngineRefused(f"{self.path}: built by TensorRT {built}, this is {here}{REBUILD}")
        target = self.key.target
        if device is None or target in ("any", str(device)) or device.capability in target.split():
            return
        raise EngineRefused(f"{self.path}: built for {target}, this is {device}{REBUILD}")

    def read(self) -> bytes:
        """The engine itself; raises `EngineRefused` for a file that is not what was written."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            raise EngineRefused(f"{self.path}: is missing{REBUILD}") from None
        if len(data) != self.bytes:
            how = "truncated" if len(data) < self.bytes else "changed"
            raise EngineRefused(
                f"{self.path}: {how}, {len(data)} bytes in place of {self.bytes}{REBUILD}"
            )
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise EngineRefused(
                f"{self.path}: has changed since it was built (SHA-256 differs){REBUILD}"
            )
        return data


def description_path(engine: Path) -> Path:
    return engine.with_name(engine.name + ".json")


def engine_path(directory: Path, graph: str, key: EngineKey) -> Path:
    return directory / f"{graph}-{key.digest}{SUFFIX}"


def write_engine(engine: EngineFile, data: Any) -> EngineFile:
    """Write the engine (a buffer) and then its description, each whole or not at all.

    Two builds of one engine differ, so a lock keeps each engine with its own description.
    """
    engine.path.parent.mkdir(parents=True, exist_ok=True)
    view = memoryview(data)
    written = replace(engine, sha256=hashlib.sha256(view).hexdigest(), bytes=view.nbytes)
    values = {
        "format": FORMAT,
        **{name: getattr(written, name) for name in ("graph", "checkpoint", "dtype", "model")},
        "key": written.key.to_dict(),
        "inputs": written.inputs,
        "outputs": written.outputs,
        "engine": {"file": written.path.name, "bytes": written.bytes, "sha256": written.sha256},
    }
    with locked(engine.path.parent):
        # An engine without a description does not count, so only complete engines are found.
        engine.description.unlink(missing_ok=True)
        with atomic_path(engine.path) as partial:
            partial.write_bytes(view)
        with atomic_path(written.description) as partial:
            partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return written


def read_description(engine: Path) -> EngineFile:
    """The description beside an engine file; raises `EngineRefused` if it is missing or has another
    format."""
    path = description_path(engine)
    try:
        for file in filter(os.path.lexists, (path, engine)):
            check_regular(file)
    except ValueError as error:
        raise EngineRefused(str(error)) from None
    try:
        values = read_json(path)
        if values.get("format") != FORMAT:
            raise ValueError(f"format {shown(values.get('format'))}; {FORMAT} is what is read")
        check_schema(values, _SCHEMA, "the description")
        key = EngineKey.from_dict(values["key"])
    except FileNotFoundError:
        raise EngineRefused(f"{engine}: no engine of ours, {path.name} is missing") from None
    except (ValueError, TypeError) as error:  # TypeError: of a range without three numbers
        reason = str(error).removeprefix(f"{path}: ")
        raise EngineRefused(f"{path}: cannot be read: {reason}{REBUILD}") from None
    return EngineFile(
        path=engine,
        key=key,
        inputs={name: tuple(shape) for name, shape in values["inputs"].items()},
        outputs={name: tuple(shape) for name, shape in values["outputs"].items()},
        sha256=values["engine"]["sha256"],
        bytes=values["engine"]["bytes"],
        **{name: values[name] for name in ("graph", "checkpoint", "dtype", "model")},
    )


def find_engines(
    directory: Path,
    graph: str,
    checkpoint: str | None = None,
    dtype: str | None = None,
    model: dict[str, Any] | None = None,
) -> list[EngineFile]:
    """The engines of ``graph`` in a directory, newest first; of these weights, this config and this
    precision if given.

    Raises `EngineRefused` if there is no such engine.
    """
    paths = sorted(directory.glob(f"{graph}-*{SUFFIX}"), key=lambda p: -p.lstat().st_mtime_ns)
    found, refused = [], []
    for path in paths:
        # Without a description, it is still being written, or its writer was killed.
        if description_path(path).exists():
            try:
                found.append(read_description(path))
            except EngineRefused as error:  # such as one of another format, beside ours
                refused.append(error)
    if not found and refused:
        raise refused[0]
    if not found:
        raise EngineRefused(f"{directory}: holds no engine of {graph}; see dit-export tensorrt")
    ours = [engine for engine in found if checkpoint in (None, engine.checkpoint)]
    if not ours:
        raise EngineRefused(f"{directory}: its {graph} was built from another model's weights")
    ours = [engine for engine in ours if model in (None, engine.model)]
    if not ours:
        raise EngineRefused(f"{directory}: its {graph} has these weights with another config")
    fitting = [engine for engine in ours if dtype in (None, engine.dtype)]
    if not fitting:
        there = ", ".join(sorted({engine.dtype for engine in ours}))
        raise EngineRefused(f"{directory}: its {graph} is in {there}; precision {dtype!r} is asked")
    return fitting
