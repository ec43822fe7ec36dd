"""Models on disk that the commands are run on."""

from __future__ import annotations

from pathlib import Path

import pytest
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
