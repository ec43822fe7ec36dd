"""Models on disk, and ways to run dit-generate on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tiny import NAMES, tiny_dit, tiny_vae

from dit_engine.checkpoint import save_pretrained


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_pretrained(path, tiny_dit(), tiny_vae(), NAMES)
    return path


@pytest.fixture(scope="session")
def bare_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without VAE and label names."""
    path = tmp_path_factory.mktemp("models") / "bare"
    save_pretrained(path, tiny_dit())
    return path


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """A function that gives the one line which a command wrote since the last call."""

    def only_line() -> str:
        out, err = capsys.readouterr()
        assert out == "" and err.endswith("\n") and err.count("\n") == 1 and "\r" not in err, err
        return err.rstrip("\n")

    return only_line


@pytest.fixture
def record_of() -> Callable[[Path], dict]:
    """A function that gives the settings recorded in a PNG."""

    def read(path: Path) -> dict:
        with Image.open(path) as image:
            return json.loads(image.text["dit_engine"])

    return read
