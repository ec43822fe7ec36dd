"""Small files that ask for gigabytes, or for hours: each is refused in little of both."""

from __future__ import annotations

import json
import struct
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import linux, outcome, refused
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_dit, tiny_vae
from torch import Tensor

from dit_engine.checkpoint import load_checkpoint, save_pretrained
from dit_engine.checkpoint.convert import model_shapes, state_to_diffusers
from dit_engine.cli.like import recorded_options
from dit_engine.cli.tensors import read_tensor
from dit_engine.config import ModelConfig
from dit_engine.labels import check_names, resolve_labels
from dit_engine.results import png_text

pytestmark = linux
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return tiny_dit(hidden_size=128).state_dict()


EMBEDDING = "y_embedder.embedding_table.weight"


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_claim_more_than_they_have(zipped: bool, state: State, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    for claim in (
        torch.zeros(1, 128).expand(10_000_000, 128),
        torch.zeros(40_000).as_strided((20_000, 20_000), (1, 1)),
    ):
        torch.save(state | {EMBEDDING: claim}, path, _use_new_zipfile_serialization=zipped)
        assert path.stat().st_size < 8_000_000
        refused(lambda: load_checkpoint(path), f"tensor '{EMBEDDING}' of shape")


@pytest.mark.slow
def test_copies_under_a_name_of_a_megabyte(tmp_path: Path) -> None:
    copies = {f"ema_{i}": {"x_embedder.proj.weight": 0} for i in range(3000)}
    torch.save({"ema" + " x" * 500_000: copies}, tmp_path / "m.pt")
    refused(lambda: load_checkpoint(tmp_path / "m.pt"), "holds several models")


def test_a_hundred_layers_in_one_storage(tmp_path: Path) -> None:
    values = {"hidden_size": 512, "num_heads": 8, "patch_size": 2, "input_size": 8}
    shapes = model_shapes(ModelConfig.from_dict(values | {"depth": 100, "num_classes": 10}))
    one = torch.zeros(max(shape.numel() for shape in shapes.values()))
    torch.save({k: one[: s.numel()].view(s) for k, s in shapes.items()}, tmp_path / "m.pt")
    refused(lambda: load_checkpoint(tmp_path / "m.pt"), "its tensors share their memory")


def test_dicts_under_a_thousand_names(tmp_path: Path) -> None:
    level: dict[str, Any] = {}
    for _ in range(5):
        level = {f"ema_{i}": level for i in range(1000)}
    torch.save(level, tmp_path / "m.pt")
    refused(lambda: load_checkpoint(tmp_path / "m.pt"), "not a named tensor")


@pytest.mark.parametrize("kind", [list, tuple, dict, OrderedDict, Namespace])
def test_options_without_end(kind: Any, state: State, tmp_path: Path) -> None:
    value: Any = 1
    for _ in range(50):
        pair = {"a": value, "b": value}
        value = Namespace(**pair) if kind is Namespace else kind(pair)
        value = kind(pair.values()) if kind in (list, tuple) else value
    for name in ("num_classes", "beta_schedule"):
        torch.save({"model": state, "args": {name: value}}, tmp_path / "m.pt")
        refused(lambda: load_checkpoint(tmp_path / "m.pt"), f"args.{name} ")


def empty_tensors(path: Path, names: Iterable[str]) -> int:
    """Write a .safetensors file without data, and return the length of its header."""
    empty = '"%s":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = "{" + ",".join(empty % name for name in names) + "}"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    return len(header)


def test_a_header_of_absurd_length(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    length = empty_tensors(path, map(str, range(200_000)))
    for read in (load_checkpoint, read_tensor):
        refused(lambda read=read: read(path), f"its header has {length} bytes")
    names = ("ema", *map(str, range(10_000)))
    empty_tensors(path, (f"{name}.x_embedder.proj.weight" for name in names))
    refused(lambda: load_checkpoint(path), "holds several models")


def test_shards_that_are_one_file(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "all.safetensors")
    names = [f"{i}.safetensors" for i in range(1000)]
    for name in names:
        (tmp_path / name).symlink_to("all.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip(names, names, strict=True))}))
    refused(lambda: load_checkpoint(index), "holds no tensors that other shards lack")


# Field of a config → what is said of 20,000, and of 10^300.
NATIVE = {
    "depth": "the config's depth is",
    "hidden_size": r"x_embedder.proj.bias is \(48,\)|hidden_size=10+.* cannot be built",
    "input_size": r"pos_embed is .* instead of|input_size=10+.* cannot be built",
    "mlp_ratio": "mlp.fc1.weight is .* instead of|mlp_ratio=1e.* cannot be built",
}
DIFFUSERS = {
    "num_layers": "the config's depth is",
    "num_attention_heads": r"is \(48, 256\) instead of \(48|hidden_size=240+.* cannot be built",
    "sample_size": "needs a position embedding of|input_size=10+.* cannot be built",
}


def refuses(path: Path, changes: list[tuple[dict[str, Any], str]]) -> None:
    """Each change of this config is refused, in one line."""
    config = json.loads(path.read_text())

    def load_all() -> None:
        for change, message in changes:
            path.write_text(json.dumps(config | change))
            with pytest.raises(ValueError, match=message) as caught:
                load_checkpoint(path.parents[path.parent.name == "vae"])
            assert "\n" not in str(caught.value)

    assert outcome(load_all) == "ok"


@pytest.mark.parametrize("value", [20_000, 10**300])
def test_configs_that_ask_for_more_than_their_file_holds(value: int, tmp_path: Path) -> None:
    model, path = tiny_dit(), tmp_path / "config.json"
    save_pretrained(tmp_path, model)
    steps = {"num_train_steps": value + 100_000}, {"num_train_steps": 1, "steps_offset": value}
    refuses(path, [({name: value}, message) for name, message in NATIVE.items()]
            + [({"diffusion": each}, "whole number") for each in steps])  # fmt: skip
    save_file(state_to_diffusers(model.state_dict(), 2), tmp_path / "model.safetensors")
    theirs = {"_class_name": "DiTTransformer2DModel", "num_layers": 2, "sample_size": 8,
              "num_attention_heads": 2, "attention_head_dim": 24, "norm_type": "ada_norm_zero",
              "num_embeds_ada_norm": 10, "out_channels": 8}  # fmt: skip
    path.write_text(json.dumps(theirs))
    load_checkpoint(tmp_path)
    refuses(path, [({name: value}, message) for name, message in DIFFUSERS.items()])


def test_vae_configs_that_ask_for_more_than_their_file_holds(tmp_path: Path) -> None:
    save_pretrained(tmp_path, tiny_dit(), tiny_vae())
    refuses(tmp_path / "vae" / "config.json", [
        ({"layers_per_block": 10**9}, "need"),
        ({"block_out_channels": [32] * 100_000}, "need"),
        ({"in_channels": 2**40}, "wrong shapes"),
        ({"block_out_channels": [2**40, 2**40]}, r"\(1099511627776,.* cannot be built"),
    ])  # fmt: skip


def test_a_vae_that_makes_huge_images(tmp_path: Path) -> None:
    from dit_engine.vae import AutoencoderKL, VAEConfig

    config = VAEConfig(block_out_channels=(1,) * 13, layers_per_block=1, norm_num_groups=1)
    save_pretrained(tmp_path / "m", tiny_dit(), AutoencoderKL(config))
    refused(lambda: load_checkpoint(tmp_path / "m"), "32768 pixels a side from latents of 8")


def test_names_of_accents() -> None:
    """Normalising them takes time that grows with the square of their number."""
    accents = "a" + "\u0301\u0316" * 200_000
    refused(lambda: resolve_labels([accents], 3, ["ant", "bee", "cat"]), "is unknown; allowed are")
    refused(lambda: check_names("label_names", ["ant", accents], 2), "of 400001 characters")


def test_a_record_of_more_images_than_it_shows(tmp_path: Path) -> None:
    many = 100_000
    record = {"model": "builtin", "noise": "per-image", "labels": [0] * many, "seeds": [0] * many}
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png", pnginfo=png_text(record))
    refused(lambda: recorded_options(tmp_path / "a.png"), "no sheet of 64×64 pixels shows its 10")
