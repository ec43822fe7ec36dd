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


@pytest.mark.parametrize(("with_vae", "names"), [(True, NAMES), (False, None), (False, NAMES)])
def test_native_directory_round_trip(
    names: tuple[str, ...] | None, with_vae: bool, tmp_path: Path
) -> None:
    model = tiny_dit(numerics="diffusers", mlp_norm_eps=1e-5, learn_sigma=False)
    vae, path = tiny_vae() if with_vae else None, tmp_path / "deep" / "model"
    save_pretrained(path, model, vae, names)
    expected = {"config.json", "model.safetensors"} | ({"labels.json"} if names else set())
    expected |= {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"} if vae else set()
    assert contents(path).keys() == expected

    checkpoint = load_checkpoint(path)
    assert (checkpoint.config, checkpoint.label_names) == (model.config, names)
    assert checkpoint.source == str(path)
    assert_same(build_model(checkpoint).state_dict(), model.state_dict())
    rebuilt = build_vae(checkpoint)
    assert (rebuilt is None) is (vae is None)
    if rebuilt is not None and vae is not None:
        assert rebuilt.config == vae.config
        assert_same(rebuilt.state_dict(), vae.state_dict())
    assert load_model(path / "model.safetensors").config == model.config


def test_half_precision_files(tmp_path: Path) -> None:
    model = tiny_dit()
    save_pretrained(tmp_path / "m", model, tiny_vae(), dtype=torch.bfloat16)
    for path in (tmp_path / "m").rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    assert load_model(tmp_path / "m").pos_embed.dtype == torch.bfloat16
    wide = load_model(tmp_path / "m", dtype=torch.float32).state_dict()
    assert_same(wide, {key: t.bfloat16().float() for key, t in model.state_dict().items()})


def test_saving_over_an_earlier_model_keeps_its_card(tmp_path: Path) -> None:
    target = tmp_path / "m"
    target.mkdir()
    save_pretrained(target, tiny_dit(0), tiny_vae(), NAMES)  # over an empty directory
    (target / "README.md").write_text("card")
    mapped = load_model(target)
    save_pretrained(target, tiny_dit(1))
    assert contents(target).keys() == {"README.md", "config.json", "model.safetensors"}
    assert (target / "README.md").read_text() == "card"
    assert_same(load_model(target).state_dict(), tiny_dit(1).state_dict())
    assert_same(mapped.state_dict(), tiny_dit(0).state_dict())  # its file's map outlives the name
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]
    save_pretrained(target, load_model(target), dtype=torch.float64)  # a model onto itself
    assert load_model(target).pos_embed.dtype == torch.float64


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("broken", ["write", "rename of the old", "rename of the new"])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_failed_save_leaves_what_was_there(
    broken: str, earlier: bool, error: BaseException, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    target, rename = tmp_path / "m", Path.rename
    if earlier:
        save_pretrained(target, tiny_dit(0), tiny_vae())
    elif broken == "rename of the old":
        return  # there is none
    before = contents(tmp_path)

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    def renamed(self: Path, to: Path) -> Path:
        suffix = "" if broken == "rename of the old" else ".partial"
        return fail() if self.suffix == suffix else rename(self, to)

    with monkeypatch.context() as patch:
        if broken == "write":
            patch.setattr("safetensors.torch.save_file", fail)
        else:
            patch.setattr(Path, "rename", renamed)
        with pytest.raises(type(error)):
            save_pretrained(target, tiny_dit(1))
    assert contents(tmp_path) == before and target.exists() is earlier
    assert not list(tmp_path.glob(".*"))


def test_an_earlier_model_that_cannot_be_put_back_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "m", Path.rename
    save_pretrained(target, tiny_dit(0))
    before = contents(target)

    def away_only(self: Path, to: Path) -> Path:
        if self != target:
            raise OSError("read-only")
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", away_only)
        with pytest.raises(OSError, match=r"the earlier model is now .*\.old \(read-only\)$"):
            save_pretrained(target, tiny_dit(1))
    (kept,) = tmp_path.iterdir()
    assert kept.name.endswith(".old") and contents(kept) == before


def test_an_interrupt_after_the_new_model_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "m", Path.rename
    save_pretrained(target, tiny_dit(0))

    def then_interrupt(self: Path, to: Path) -> None:
        rename(self, to)
        if to == target:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", then_interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_pretrained(target, tiny_dit(1))
    assert_same(load_model(target).state_dict(), tiny_dit(1).state_dict())
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_label_names_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 label names for 10 classes"):
        save_pretrained(tmp_path / "m", tiny_dit(), label_names=["a", "b"])
    assert not list(tmp_path.iterdir())
