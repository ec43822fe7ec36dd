"""`save_pretrained`: what it writes, and what it leaves alone when it fails or is interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import NAMES, tiny_dit, tiny_vae

from dit_engine.checkpoint import (
    build_model,
    build_vae,
    load_checkpoint,
    load_model,
    save_pretrained,
)


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def contents(directory: Path) -> dict[str, bytes]:
    files = [p for p in directory.rglob("*") if p.is_file()]
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in files}


def test_native_directory_round_trip(tmp_path: Path) -> None:
    model = tiny_dit(numerics="diffusers", mlp_norm_eps=1e-5, learn_sigma=False)
    vae, path = tiny_vae(), tmp_path / "deep" / "model"
    save_pretrained(path, model, vae, NAMES)
    files = {"config.json", "model.safetensors", "labels.json", "vae/config.json",
             "vae/diffusion_pytorch_model.safetensors"}  # fmt: skip
    assert contents(path).keys() == files
    checkpoint = load_checkpoint(path)
    assert (checkpoint.config, checkpoint.label_names) == (model.config, NAMES)
    assert checkpoint.source == str(path)
    assert_same(build_model(checkpoint).state_dict(), model.state_dict())
    rebuilt = build_vae(checkpoint)
    assert rebuilt is not None and rebuilt.config == vae.config
    assert_same(rebuilt.state_dict(), vae.state_dict())
    assert load_model(path / "model.safetensors").config == model.config
    with pytest.raises(ValueError, match="2 label names for 10 classes"):
        save_pretrained(tmp_path / "m", model, label_names=["a", "b"])


def test_saving_over_an_earlier_model_keeps_its_card(tmp_path: Path) -> None:
    target = tmp_path / "m"
    target.mkdir()
    save_pretrained(target, tiny_dit(0), tiny_vae(), NAMES)  # over an empty directory
    (target / "README.md").write_text("card")
    mapped = load_model(target)
    save_pretrained(target, tiny_dit(1), dtype=torch.bfloat16)
    assert contents(target).keys() == {"README.md", "config.json", "model.safetensors"}
    assert (target / "README.md").read_text() == "card"
    assert_same(mapped.state_dict(), tiny_dit(0).state_dict())  # its file's map outlives the name
    stored = {key: tensor.bfloat16() for key, tensor in tiny_dit(1).state_dict().items()}
    assert_same(load_file(target / "model.safetensors"), stored)
    save_pretrained(target, load_model(target), dtype=torch.float64)  # a model onto itself
    assert load_model(target).pos_embed.dtype == torch.float64
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("broken", ["write", "rename of the old", "rename of the new"])
def test_a_failed_save_leaves_what_was_there(
    broken: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "m", Path.rename
    save_pretrained(target, tiny_dit(0))
    before = contents(tmp_path)

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    def renamed(self: Path, to: Path) -> Path:
        suffix = "" if broken == "rename of the old" else ".partial"
        return fail() if self.suffix == suffix else rename(self, to)

    if broken == "write":
        monkeypatch.setattr("safetensors.torch.save_file", fail)
    else:
        monkeypatch.setattr(Path, "rename", renamed)
    with pytest.raises(type(error)):
        save_pretrained(target, tiny_dit(1))
    assert contents(tmp_path) == before and not list(tmp_path.glob(".*"))
