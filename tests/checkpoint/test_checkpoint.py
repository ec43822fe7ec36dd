"""Every form of model that `load_checkpoint` reads, and where it is found."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from numerics import assert_close_to_reference
from safetensors.torch import save_file
from tiny import tiny_dit, tiny_vae
from vectors import Vectors

from dit_engine.checkpoint import load_checkpoint, load_model, save_pretrained
from dit_engine.checkpoint.convert import model_shapes
from dit_engine.checkpoint.hub import locate
from dit_engine.checkpoint.infer import infer_config, infer_heads
from dit_engine.config import ModelConfig
from dit_engine.model import DiT


@pytest.mark.parametrize("form", ["plain.pt", "training.pt", "legacy.pth", "file.safetensors"])
def test_official_files_in_float64(vectors: Vectors, form: str, tmp_path: Path) -> None:
    """The reference's weights through every kind of file give the reference's outputs.

    Bit for bit those of the module that the weights were put into directly. test_model.py compares
    that module with the vectors (in float64 they are 1e-7 apart on some machines).
    """
    state = vectors.model().state_dict()
    path = tmp_path / form
    if form == "file.safetensors":
        save_file(state, path)
    elif form == "training.pt":  # what the published training script writes
        args = argparse.Namespace(model="DiT-XL/2", image_size=256, global_batch_size=256)
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()
        other = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
        torch.save({"model": other, "ema": state, "opt": optimizer, "args": args}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form != "legacy.pth")
    # Widths 48 and 144 tell no number of heads (144 is 2 × 72).
    model = load_model(path, num_heads=2)
    assert model.config == vectors.config and not model.training
    x, t, y = vectors["forward.x"].double(), vectors["forward.t"], vectors["forward.y"]
    with torch.no_grad():
        out = model(x, t, y)
        assert torch.equal(out, vectors.model()(x, t, y))
        assert_close_to_reference(out, vectors["forward.out"], tolerance=1e-5)
        out = load_model(path, num_heads=2, dtype=torch.float32)(x.float(), t, y)
        assert out.dtype == torch.float32
        assert_close_to_reference(out, vectors["forward.out"], tolerance=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig.named("S/8", num_classes=3),
        ModelConfig.named("XL/2", learn_sigma=False),
        ModelConfig(1, 144, 2, 4, 16, in_channels=16),
        # 448 times the float 230 / 448 is below 230.
        ModelConfig(1, 448, 7, 2, 4, mlp_ratio=math.nextafter(230 / 448, 1)),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:hidden size")
def test_config_from_tensors(config: ModelConfig) -> None:
    with torch.device("meta"):
        state = DiT(config).state_dict()
    inferred = infer_config(state)
    assert inferred.mlp_hidden_size == config.mlp_hidden_size
    assert {**inferred.to_dict(), "mlp_ratio": 0} == {**config.to_dict(), "mlp_ratio": 0}


def test_heads_from_the_width() -> None:
    for width, heads in ((512, 8), (216, 3)):
        with pytest.warns(UserWarning, match=f"hidden size {width} is none of .*{heads} heads"):
            assert infer_heads(width) == heads
    for width, why in ((576, "both 64 and 72"), (100, "neither 64 and 72")):
        with pytest.raises(ValueError, match=f"hidden size {width} does not tell .*{why}"):
            infer_heads(width)


def test_positions_and_dtype_come_from_the_file(tmp_path: Path) -> None:
    state = tiny_dit().half().state_dict()
    torch.save(state | {"pos_embed": torch.full((1, 16, 48), 0.5)}, tmp_path / "mixed.pt")
    model = load_model(tmp_path / "mixed.pt", num_heads=2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert (model.pos_embed == 0.5).all()


def test_numerics_by_name(tmp_path: Path) -> None:
    save_pretrained(tmp_path, tiny_dit(numerics="diffusers", mlp_norm_eps=1e-3))
    for numerics, eps in ((None, 1e-3), ("diffusers", 1e-3), ("official", 1e-6)):
        config = load_model(tmp_path, numerics=numerics).config
        assert (config.numerics, config.mlp_norm_eps) == (numerics or "diffusers", eps)
    save_pretrained(tmp_path, tiny_dit())
    assert load_model(tmp_path, numerics="diffusers").config.mlp_norm_eps == 1e-5


def test_vae_of_another_directory(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "with", tiny_dit(), tiny_vae(seed=1))
    save_pretrained(tmp_path / "own", tiny_dit(), tiny_vae(seed=2))
    file = "with/vae/diffusion_pytorch_model.safetensors"
    for source, vae in (("own/model.safetensors", "with/vae"), ("own", file), ("own", "with")):
        checkpoint = load_checkpoint(tmp_path / source, vae=tmp_path / vae)
        assert checkpoint.vae_config == tiny_vae().config
        state = tiny_vae(seed=1).state_dict()
        torch.testing.assert_close(checkpoint.vae_state_dict, state, rtol=0, atol=0)


def test_source_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is here is never sought elsewhere, and a size is no model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    for name in ("DiT-XL/2", "S/8", "DiT-B-4"):
        with pytest.raises(ValueError, match=f"^model '{name}' is a size, for which there are no"):
            locate(name)
    for name, found in (("owner/name", "owner/name"), ("XL/2", "XL/2"), ("./builtin", "builtin"),
                        ("~/owner", tmp_path / "owner")):  # fmt: skip
        (tmp_path / found).mkdir(parents=True, exist_ok=True)
        assert locate(name) == Path(found)
    monkeypatch.setattr("dit_engine.checkpoint.hub.BUILTIN_DIRECTORY", tmp_path / "package")
    with pytest.raises(FileNotFoundError, match="'builtin' is missing from this installation"):
        locate("builtin")


def test_hub_id_takes_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Safetensors are asked for first; pickles only where a component has none."""
    needed = ["model_index.json", "scheduler/scheduler_config.json", "transformer/config.json",
              "transformer/diffusion_pytorch_model.bin", "vae/config.json",
              "vae/diffusion_pytorch_model.safetensors"]  # fmt: skip
    others = ["README.md", "transformer/diffusion_pytorch_model.fp16.bin",
              "vae/diffusion_pytorch_model.bin"]  # fmt: skip
    fetched: list[str] = []

    def snapshot(repo_id: str, allow_patterns: list[str]) -> str:
        assert repo_id == "facebook/DiT-XL-2-256"
        for name in needed + others:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).touch()
                fetched.append(name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert locate("facebook/DiT-XL-2-256") == tmp_path
    assert sorted(fetched) == needed


# getrusage's ru_maxrss would start at the parent's peak; VmHWM belongs to the new program alone.
# torch would import sympy to draw random numbers for a module without storage.
MEASURE = """
import sys, torch
from dit_engine.checkpoint import load_model
torch.ones(1).sum(dtype=torch.float64)
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
before = peak()
model = load_model(sys.argv[1])
total = sum(p.detach().sum(dtype=torch.float64).item() for p in model.parameters())
print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()), total)
assert "sympy" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_holds_one_copy(tmp_path: Path) -> None:
    """Peak memory of loading and reading every weight of a DiT-B/2 (0.5 GB) is one copy."""
    shapes = model_shapes(ModelConfig.named("B/2"))
    state = {name: torch.full(shape, 0.25) for name, shape in shapes.items()}
    path = tmp_path / "DiT-B-2-256x256.pt"
    torch.save({"ema": state}, path)
    command = [sys.executable, "-c", MEASURE, str(path)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    grown, size, total = map(float, run.stdout.split())
    expected = sum(tensor.sum(dtype=torch.float64).item() for tensor in state.values())
    assert total == pytest.approx(expected, rel=1e-9)
    assert size > 5e8 and 0.9 * size < grown < 1.2 * size  # measured: 1.06 to 1.10
