"""Checkpoints that are damaged, hostile or something else: one line that names what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import re
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import NAMES, tiny_dit, tiny_vae
from torch import Tensor

from dit_engine.checkpoint import load_checkpoint, load_model, save_pretrained


def refused(source: str | Path, message: str, kind: type[Exception] = ValueError, **kw: Any) -> str:
    """Loading raises ``kind`` with a single line that matches; no chain of causes is shown."""
    with pytest.raises(kind, match=message) as caught:
        load_checkpoint(source, **kw)
    text = str(caught.value)
    assert "\n" not in text
    assert Path(source).name in text
    assert len(text) < 600
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


@pytest.fixture
def state() -> dict[str, Tensor]:
    return tiny_dit(hidden_size=128).state_dict()


@pytest.fixture
def native(tmp_path: Path) -> Path:
    save_pretrained(tmp_path / "native", tiny_dit(), tiny_vae(), NAMES)
    return tmp_path / "native"


@pytest.mark.parametrize(
    "name", ["no/such/model.pt", "model.safetensors", "nothing", "a/b.pt", "a/b/c", " ", "../x/y"]
)
def test_missing_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = f"model '{name}' does not exist; give 'builtin', a path or a hub id owner/name"
    refused(name, re.escape(expected), FileNotFoundError)


@pytest.mark.parametrize(
    ("name", "message", "kind"),
    [
        ("", "^model '' is empty", ValueError),
        ("~nobody-of-this-name/x.pt", "^model '~nobody-of-this-name/x.pt': the home", ValueError),
        ("nul\0.pt", r"^model 'nul\\x00.pt' does not exist", FileNotFoundError),
        ("two\nlines.pt", r"^model 'two\\nlines.pt' does not exist", FileNotFoundError),
        ("x" * 5000, "xxx", OSError),
        (None, "^model None is neither a string nor a path$", ValueError),
        (b"model.pt", "^model b'model.pt' is neither", ValueError),
    ],
    ids=["empty", "home of nobody", "nul", "newline", "too long", "none", "bytes"],
)
def test_odd_names(name: Any, message: str, kind: type[Exception], native: Path) -> None:
    sources = [{"source": name}]
    if name is not None:  # no VAE is a choice
        sources.append({"source": native, "vae": name})
    for options in sources:
        expected = message.replace("^model", "^vae") if "vae" in options else message
        with pytest.raises(kind, match=expected) as caught:
            load_checkpoint(**options)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read it all")
@pytest.mark.parametrize("mode", [0o000, 0o100, 0o400])
def test_directory_without_permission(mode: int, native: Path) -> None:
    (native / "config.json").unlink()
    native.chmod(mode)
    try:
        with pytest.raises(OSError, match=r"Permission denied: .*native") as caught:
            load_checkpoint(native)
        assert "\n" not in str(caught.value)
    finally:
        native.chmod(0o700)
    (native / "model.safetensors").chmod(0)
    with pytest.raises(PermissionError, match=r"Permission denied: .*model\.safetensors"):
        load_checkpoint(native / "model.safetensors")


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, 0.99])
@pytest.mark.parametrize("form", ["zip.pt", "legacy.pt", "file.safetensors"])
def test_truncated_file(state: dict[str, Tensor], form: str, kept: float, tmp_path: Path) -> None:
    path = tmp_path / form
    if form == "file.safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip.pt")
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    refused(path, "damaged")


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("content", [b"\x00" * 4096, b"PK\x03\x04" * 99, b"ab" * 2000])
def test_files_of_something_else(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"download{suffix}"
    path.write_bytes(content)
    refused(path, "damaged")


def test_zip_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "a.pt", "damaged or not a PyTorch file")


@pytest.mark.parametrize("suffix", [".txt", ".onnx", ""])
def test_unknown_suffix(state: dict[str, Tensor], suffix: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / f"m{suffix}")
    refused(tmp_path / f"m{suffix}", f"suffix '{suffix}' is not one of .pt, .pth, .ckpt")


class Payload:
    """Runs ``touch marker`` when a careless reader unpickles it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle", "in args", "protocol 4"])
def test_pickle_that_wants_to_run_code(state: dict[str, Tensor], form: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    payload = Payload(marker)
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(payload, protocol=2))
    elif form == "protocol 4":
        path.write_bytes(pickle.dumps(payload, protocol=4))
    elif form == "in args":
        import argparse

        args = argparse.Namespace(model="DiT-XL/2", hook=payload)
        torch.save({"ema": state, "args": args}, path)
    else:
        torch.save(state | {"x": payload}, path, _use_new_zipfile_serialization=form == "zip")
    asks = r"the pickle asks for '(posix|nt)\.system'; only tensors are loaded"
    # torch does not even read the instructions of protocol 4.
    refused(path, r"\(Unsupported operand 149\)" if form == "protocol 4" else asks)
    assert not marker.exists()
    if form == "zip":  # the payload is a real one: a reader without the guard does run it
        torch.load(path, weights_only=False)
        assert marker.exists()


def test_pickled_module(tmp_path: Path) -> None:
    torch.save(tiny_dit(), tmp_path / "module.pt")
    refused(tmp_path / "module.pt", "the pickle asks for 'dit_engine.model.DiT'")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a state dict"),
        (torch.zeros(2), "holds a Tensor, not a state dict"),
        ({"step": 3}, "'step' is a int, not a named tensor"),
        ({0: torch.zeros(1)}, "0 is a Tensor, not a named tensor"),
        ({}, "no DiT, key 'x_embedder.proj.weight' is missing; it holds nothing"),
        ({"w": torch.zeros(2, dtype=torch.int64)}, "'w' is torch.int64"),
        ({"w": torch.eye(2).to_sparse()}, "'w' is torch.float32 .torch.sparse_coo"),
        ({"conv.weight": torch.zeros(2), "b": torch.ones(1)},
         "no DiT, key 'x_embedder.proj.weight' is missing; it holds 'conv.weight', 'b'$"),
    ],
    ids=str,
)  # fmt: skip
def test_pt_files_of_something_else(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", message)


@pytest.mark.parametrize("source", ["file", "directory"])
@pytest.mark.filterwarnings("ignore:hidden size")
def test_missing_and_extra_keys(source: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_pretrained(tmp_path / "m", tiny_dit(hidden_size=128))
    if source == "directory":
        path = tmp_path / "m" / path.name
    for i in (0, 1):
        del state[f"blocks.{i}.attn.qkv.bias"], state[f"blocks.{i}.mlp.fc2.weight"]
    state |= {"head.weight": torch.zeros(2), "head.bias": torch.zeros(2)}
    save_file(state, path)
    text = refused(path if source == "file" else path.parent, "keys missing")
    assert text.endswith(
        "4 keys missing: 'blocks.0.attn.qkv.bias', 'blocks.0.mlp.fc2.weight', "
        "'blocks.1.attn.qkv.bias' and 1 more; 2 keys too many: 'head.bias', 'head.weight'"
    )


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("blocks.1.attn.qkv.weight", (384, 64),
         r"1 wrong shapes: blocks.1.attn.qkv.weight is \(384, 64\) instead of \(384, 128\)"),
        ("x_embedder.proj.bias", (64,), r"x_embedder.proj.bias is \(64,\) instead of \(128,\)"),
        ("x_embedder.proj.weight", (128, 16), r"x_embedder.proj.weight is \(128, 16\), not of 4"),
        ("x_embedder.proj.weight", (0, 4, 2, 2), r"weight is \(0, 4, 2, 2\), not of 4 dim"),
        ("pos_embed", (1, 17, 128), "pos_embed holds 17 tokens, which is no square"),
        ("final_layer.linear.weight", (30, 128), "gives 30 values a token; patch 2 and 4 channels"),
        ("y_embedder.embedding_table.weight", (1, 128), "num_classes 0 is not a positive integer"),
        ("blocks.0.mlp.fc1.weight", (500, 128), r"fc1.bias is \(512,\) instead of \(500,\)"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:hidden size")
def test_wrong_shapes(
    state: dict[str, Tensor], key: str, shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    torch.save(state | {key: torch.zeros(shape)}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", message)


@pytest.mark.filterwarnings("ignore:hidden size")
def test_missing_block(state: dict[str, Tensor], tmp_path: Path) -> None:
    without = {k.replace("blocks.1.", "blocks.7."): v for k, v in state.items()}
    torch.save(without, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "block 1 is missing, block 7 is there")


def test_heads_that_cannot_be_known(tmp_path: Path) -> None:
    torch.save(tiny_dit(hidden_size=48).state_dict(), tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "hidden size 48 does not tell the number of heads .* give num_heads")
    refused(tmp_path / "m.pt", "48 is not a multiple of num_heads 5", num_heads=5)
    assert load_model(tmp_path / "m.pt", num_heads=4).config.num_heads == 4


def test_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "needs config.json or model_index.json, it holds nothing")
    refused_vae = r"no VAE; it needs config.json, it holds nothing"
    torch.save(tiny_dit().state_dict(), tmp_path / "m.pt")
    with pytest.raises(ValueError, match=f"empty: {refused_vae}"):
        load_checkpoint(tmp_path / "m.pt", vae=tmp_path / "empty", num_heads=2)


def test_directory_of_something_else(tmp_path: Path) -> None:
    (tmp_path / ".cache").touch()
    refused(tmp_path, "it holds nothing$")
    for name in ("notes.md", "photo.jpg", "a.txt", "z.txt"):
        (tmp_path / name).touch()
    refused(tmp_path, "it holds 'a.txt', 'notes.md', 'photo.jpg' and 1 more")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"_class_name": "BertModel"}', "config.json is of class 'BertModel'; known are DiT, "),
        ('{"model_type": "bert"}', "config.json is of class None"),
        ('{"_class_name": ["DiT"]}', "config.json is of class"),
        ('{"_class_name": "DiT"', "config.json: not valid JSON"),
        ("[1]", "config.json: holds a list, not a JSON object"),
        ('{"_class_name": "DiT", "depth": 2}', "config key 'hidden_size' is missing"),
        ("DiT-XL/2", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
    ],
    ids=str,
)
def test_damaged_config(native: Path, config: str | bytes, message: str) -> None:
    (native / "config.json").write_bytes(config if isinstance(config, bytes) else config.encode())
    refused(native, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 3}, "config key 'colour' is unknown"),
        ({"depth": 3}, "the config's depth is 3, the file holds 2 blocks"),
        ({"depth": 10**12}, "the config's depth is 1000000000000"),
        ({"num_heads": 7}, "hidden_size 48 is not a multiple of num_heads 7"),
        ({"hidden_size": 96}, "wrong shapes: pos_embed is"),
        ({"hidden_size": 4 * 10**18}, "cannot be built|wrong shapes"),
        ({"mlp_ratio": "four"}, "mlp_ratio 'four' is not a finite number above 0$"),
        ({"mlp_ratio": None}, "mlp_ratio None is not a finite number above 0$"),
        ({"mlp_ratio": True}, "mlp_ratio True is not a finite number above 0$"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio nan is not a finite number above 0$"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio inf is not a finite number above 0$"),
        ({"mlp_ratio": 0}, "mlp_ratio 0 is not a finite number above 0$"),
        ({"mlp_ratio": 1e300}, "cannot be built|wrong shapes"),
        ({"mlp_ratio": 10**30}, "cannot be built"),
        ({"mlp_norm_eps": "1e-6"}, "mlp_norm_eps '1e-6' is not a finite number above 0$"),
        ({"mlp_norm_eps": False}, "mlp_norm_eps False is not a finite number above 0$"),
        ({"mlp_norm_eps": [1e-6]}, r"mlp_norm_eps \[1e-06\] is not a finite number above 0$"),
        ({"learn_sigma": 1}, "learn_sigma 1 is neither True nor False$"),
        ({"learn_sigma": "no"}, "learn_sigma 'no' is neither True nor False$"),
        ({"numerics": "exact"}, "numerics 'exact': choose one of official, diffusers"),
    ],
    ids=str,
)
def test_config_that_does_not_fit(native: Path, change: dict[str, Any], message: str) -> None:
    path = native / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(native, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["ant", "bee"]', "2 label names, 10 classes"),
        ('{"0": "ant"}', "labels.json: not a list of names"),
        ("[1, 2]", "labels.json: not a list of names"),
        ("[", "labels.json: not valid JSON"),
    ],
)
def test_damaged_labels(native: Path, text: str, message: str) -> None:
    (native / "labels.json").write_text(text)
    refused(native, message)


def test_directory_without_weights(native: Path) -> None:
    (native / "model.safetensors").rename(native / "weights.h5")
    refused(native, "holds no weights; model.safetensors or diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    "shard", ["../m.safetensors", "/etc/passwd", "m.bin.index.json", "gone.bin"]
)
def test_shard_index_that_points_elsewhere(shard: str, native: Path) -> None:
    (native / "model.safetensors").unlink()
    index = native / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"pos_embed": shard}}))
    kind = FileNotFoundError if shard == "gone.bin" else ValueError
    with pytest.raises(kind, match=r"gone\.bin|is not a file name"):
        load_checkpoint(native)
    index.write_text("{}")
    refused(native, "holds no weight_map")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["model", "vae"])
def test_weights_that_are_not_finite(native: Path, value: float, part: str) -> None:
    model, vae = tiny_dit(), tiny_vae()
    broken = model.blocks[1].mlp.fc2.weight if part == "model" else vae.decoder.conv_out.weight
    broken.data.view(-1)[3] = value
    save_pretrained(native, model, vae, NAMES)
    load_checkpoint(native)  # only on request: it reads every weight
    name = "blocks.1.mlp.fc2.weight" if part == "model" else "decoder.conv_out.weight"
    counts = "1 NaN and 0 infinite" if value != value else "0 NaN and 1 infinite"
    with pytest.raises(ValueError, match=f"tensor '{name}' holds {counts} values") as caught:
        load_checkpoint(native, check_finite=True)
    assert "\n" not in str(caught.value)
    if part == "model":
        with pytest.raises(ValueError, match=name):
            load_model(native, check_finite=True)


def test_finite_weights_pass(native: Path) -> None:
    load_checkpoint(native, check_finite=True)


@pytest.mark.parametrize("how", ["offline mode", "no network"])
def test_hub_id_without_network(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", how == "offline mode")

    def unreachable(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(socket.socket, "connect", unreachable)
    text = refused(
        "facebook/DiT-XL-2-256",
        "^model 'facebook/DiT-XL-2-256' is no path here, and the Hugging Face hub did not give it",
    )
    assert re.search("outgoing traffic has been disabled|Name or service|Connect", text)
    assert not list(tmp_path.glob("*.partial"))


def test_vae_hub_id_without_network(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(native.parent / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="model 'stabilityai/sd-vae-ft-ema' is no path here"):
        load_checkpoint(native, vae="stabilityai/sd-vae-ft-ema")
