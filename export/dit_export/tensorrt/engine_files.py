"""Engine files: a TensorRT engine with a JSON file beside it that says what it was built from.

An engine runs only where its key fits: with the same flavour and version of TensorRT, and on a
device that it was built for. The key's digest is part of the file's name, so that engines of
several versions can be in one directory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

from dit_engine.arguments import shown
from dit_engine.io.files import atomic_path, check_regular, locked
from dit_engine.io.json_files import check_schema, read_json
from dit_export.tensorrt.installed import CudaDevice
from dit_export.tensorrt.profiles import Profile, Profiles, Range

FORMAT = 2
# An earlier release could put an operator of its own into engines: then "plugins" named it.
_SCHEMA = {
    "": {
        "format": (FORMAT,), "graph": "line", "checkpoint": "line", "dtype": "line",
        "model": "object", "key": "object", "engine": "object",
    },
    "key": {
        "graph": "line", "flavour": "line", "version": "line", "target": "line",
        "profiles": "list", "workspace_bytes": "count", "plugins": ([],),
    },
    "key.profiles[]": {"batch": "count[]", "size": "count[]?"},
    "engine": {"bytes": "count", "sha256": "line"},
}  # fmt: skip
_SAME = ("graph", "checkpoint", "dtype", "model")
REBUILD = "; build it again with dit-export tensorrt"


class EngineRefused(ValueError):
    """An engine file that must not be used here; the message says why and how to get another."""


@dataclass(frozen=True)
class EngineKey:
    """Everything that an engine depends on.

    Attributes:
        graph: SHA-256 of the ONNX graph with its weights.
        flavour, version: of TensorRT (`Flavour`).
        target: the devices that it runs on: "NVIDIA H200 (9.0)", compute capabilities such as
            "8.9 12.0", or "any" for every one that TensorRT for RTX knows.
        profiles: in the order in which they are in the engine.
        workspace_bytes: what layers may use beside inputs, outputs and weights; 0 is no limit.
    """

    graph: str
    flavour: str
    version: str
    target: str
    profiles: Profiles
    workspace_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        profiles = [
            {"batch": astuple(p.batch), "size": None if p.size is None else astuple(p.size)}
            for p in self.profiles
        ]
        return asdict(self) | {"profiles": profiles, "plugins": []}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineKey:
        profiles = tuple(
            Profile(Range(*p["batch"]), None if p.get("size") is None else Range(*p["size"]))
            for p in values["profiles"]
        )
        if not profiles:
            raise ValueError("profiles [] is empty")
        facts: dict[str, Any] = {k: v for k, v in values.items() if k != "plugins"}
        facts["profiles"] = profiles
        return cls(**facts)

    @property
    def digest(self) -> str:
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class EngineFile:
    """An engine on disk, of an export's graph such as "denoiser". checkpoint is the SHA-256 of the
    weights, and model the transformer's config, because the same weights may be used with another.
    """

    path: Path
    graph: str
    checkpoint: str
    dtype: str
    key: EngineKey
    sha256: str = ""
    bytes: int = 0
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def description(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    def check(self, flavour: str, version: str, device: CudaDevice) -> None:
        """Raise `EngineRefused` unless this TensorRT can run it on ``device``."""
        built, here = f"{self.key.flavour} {self.key.version}", f"{flavour} {version}"
        if built != here:
            raise EngineRefused(f"{self.path}: built by TensorRT {built}, this is {here}{REBUILD}")
        target = self.key.target
        if target not in ("any", str(device)) and device.capability not in target.split():
            raise EngineRefused(f"{self.path}: built for {target}, this is {device}{REBUILD}")

    def read(self) -> bytes:
        """The engine's bytes; raises `EngineRefused` if the file has changed since its writing."""
        if not self.path.exists():
            raise EngineRefused(f"{self.path}: is missing{REBUILD}")
        data = self.path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.sha256:
            size = f"{len(data)} bytes, built with {self.bytes}"
            raise EngineRefused(f"{self.path}: has changed since it was built ({size}){REBUILD}")
        return data


def engine_path(directory: Path, graph: str, key: EngineKey) -> Path:
    return directory / f"{graph}-{key.digest}.engine"


def write_engine(engine: EngineFile, data: Any) -> EngineFile:
    """Write the engine (a buffer) and then its description, each whole or not at all.

    Two builds of one engine differ, so a lock keeps each engine with its own description.
    """
    engine.path.parent.mkdir(parents=True, exist_ok=True)
    view = memoryview(data)
    written = replace(engine, sha256=hashlib.sha256(view).hexdigest(), bytes=view.nbytes)
    values = {
        "format": FORMAT,
        **{name: getattr(written, name) for name in _SAME},
        "key": written.key.to_dict(),
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
    path = engine.with_name(f"{engine.name}.json")
    try:
        for file in filter(os.path.lexists, (path, engine)):
            check_regular(file)
        values = read_json(path)
        check_schema(values, _SCHEMA, path)
        key = EngineKey.from_dict(values["key"])
    except FileNotFoundError:
        raise EngineRefused(f"{engine}: no engine of ours, {path.name} is missing") from None
    except (ValueError, TypeError) as error:  # TypeError: of a range without three numbers
        reason = str(error).removeprefix(f"{path}: ")
        raise EngineRefused(f"{path}: cannot be read: {reason}{REBUILD}") from None
    made, facts = values["engine"], {name: values[name] for name in _SAME}
    return EngineFile(engine, key=key, sha256=made["sha256"], bytes=made["bytes"], **facts)


def find_engines(
    directory: Path,
    graph: str,
    check: Callable[[EngineFile], None] = lambda _: None,
    **facts: Any,
) -> list[EngineFile]:
    """The engines of ``graph`` in a directory, newest first, that have these ``facts`` (attributes
    of `EngineFile`, such as ``checkpoint``) and for which ``check`` raises no `EngineRefused`.

    Raises `EngineRefused` if there is no such engine.
    """
    found, refused = [], []
    for path in sorted(directory.glob(f"{graph}-*.engine"), key=lambda p: -p.lstat().st_mtime_ns):
        # Without a description, it is still being written, or its writer was killed.
        if not path.with_name(f"{path.name}.json").exists():
            continue
        try:
            engine = read_description(path)
            for name, fact in facts.items():
                if (own := getattr(engine, name)) != fact:
                    values = f" ({shown(own)}, and {shown(fact)} is asked for)"
                    shorter = "" if name == "model" else values
                    raise EngineRefused(f"{path}: was built of another {name}{shorter}")
            check(engine)
            found.append(engine)
        except EngineRefused as error:  # such as one of another format, beside ours
            refused.append(error)
    if not found:
        missing = f"{directory}: holds no engine of {graph}; see dit-export tensorrt"
        raise refused[0] if refused else EngineRefused(missing)
    return found
