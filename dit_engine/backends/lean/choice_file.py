"""Stores the measured times of kernels in a file, so that later processes need not measure."""

from __future__ import annotations

import json
import re
import warnings
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dit_engine._version import __version__
from dit_engine.io.caches import cache_directory, private_cache
from dit_engine.io.files import atomic_path, locked
from dit_engine.io.json_files import Schema, check_schema, read_json
from dit_engine.io.printable import one_line
from dit_kernels.chooser import Times

FOLDER = "choices"
SCHEMA: Schema = {
    "": {"facts": "object", "times": "object"},
    "facts": {"device": "line", "<line>": "line"},
    "times": {"<line>": "object"},
    "times{}": {"<line>": "positive?"},
}
_DRIVER = Path("/proc/driver/nvidia/version")


class ChoiceFile:
    """The times measured on GPUs of one model. The file is named after the model.

    A broken or unwritable file raises nothing: there is one warning, and kernels are measured again
    or their times are not stored. Times measured with another driver or another version of torch,
    Triton or DiT Engine are ignored and overwritten.
    """

    def __init__(self, device: torch.device) -> None:
        self.facts = facts(device)
        self._times: dict[str, Times] = {}
        self._path: Path | None = None
        try:
            folder = private_cache(FOLDER)
        except (OSError, ValueError) as error:
            self._warn(f"kernel times are not stored: {one_line(error)}")
            return
        name = re.sub(r"[^a-z0-9]+", "-", self.facts["device"].lower()).strip("-")
        self._path = folder / f"{name}.json"
        try:
            self._times = self._read()
        except (OSError, ValueError) as error:
            self._warn(f"{one_line(error)}; kernels are measured again")

    def recall(self, key: str) -> Times | None:
        """The stored times of a key of `dit_kernels.chooser.Chooser`, or None."""
        return self._times.get(key)

    def remember(self, key: str, times: Times) -> None:
        """Store the times of a key beside those that other processes may have stored meanwhile."""
        self._times[key] = times
        if self._path is None:
            return
        try:
            with locked(self._path.parent):
                with suppress(OSError, ValueError):
                    self._times = self._read() | self._times
                with atomic_path(self._path) as partial:
                    held = {"facts": self.facts, "times": self._times}
                    partial.write_text(json.dumps(held, indent=1), encoding="utf-8")
        except OSError as error:
            self._warn(f"kernel times are not stored: {one_line(error)}")
            self._path = None

    def _read(self) -> dict[str, Times]:
        assert self._path is not None
        if not self._path.exists():
            return {}
        held = _read(self._path)
        for name, value in self.facts.items():
            if held["facts"].get(name) != value:
                was = held["facts"].get(name)
                raise ValueError(f"{self._path}: measured with {name} {was}, which is now {value}")
        return held["times"]

    @staticmethod
    def _warn(what: str) -> None:
        warnings.warn(what, stacklevel=2)


def remembered() -> dict[str, dict[str, Times]]:
    """GPU model → key → times in milliseconds, from all files that can be read."""
    found = {}
    with suppress(OSError, ValueError):
        for path in sorted((cache_directory() / FOLDER).glob("*.json")):
            with suppress(OSError, ValueError):
                held = _read(path)
                found[held["facts"]["device"]] = held["times"]
    return found


def _read(path: Path) -> dict[str, Any]:
    held = read_json(path)
    check_schema(held, SCHEMA, path)
    return held


def facts(device: torch.device) -> dict[str, str]:
    """The GPU model and the versions that a measurement on a CUDA device depends on."""
    return {
        "device": torch.cuda.get_device_name(device),
        "driver": driver(),
        "torch": torch.__version__,
        "triton": import_module("triton").__version__,
        "dit_engine": __version__,
    }


def driver() -> str:
    """The version of NVIDIA's driver; "unknown" if it is not in /proc, as in WSL."""
    with suppress(OSError):
        said = _DRIVER.read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"Kernel Module.*?(\d+\.[\d.]+)", said):
            return found[1]
    return "unknown"
