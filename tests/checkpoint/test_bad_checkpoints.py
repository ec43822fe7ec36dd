"""Checkpoints that are damaged, hostile or something else: one line names what is wrong."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shutil
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import NAMES, tiny_dit, tiny_vae

from dit_engine.checkpoint import load_checkpoint, load_model, save_pretrained

STATE = tiny_dit(hidden_size=128).state_dict()


def refused(source: str | Path, message: str, kind: type[Exception] = ValueError, **kw: Any) -> str:
    """Loading raises ``kind`` with a single line that matches; no chain of causes is shown."""
    with pytest.raises(kind, match=message) as caught:
        load_checkpoint(source, **kw)
    text = str(caught.value)
    assert "\n" not in text and Path(source).name in text and len(text) < 600
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "native"
    save_pretrained(path, tiny_dit(), tiny_vae(), NAMES)
    return path


@pytest.fixture
def native(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "native")


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("no/such/model.pt", "model.safetensors", "nothing", "a/b/c", " ", "../x/y"):
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
def test_odd_names(name: Any, message: str, kind: type[Exception], saved: Path) -> None:
    sources = [{"source": name}] + ([{"source": saved, "vae": name}] if name is not None else [])
    for options in sources:
        expected = message.replace("^model", "^vae") if "vae" in options else message
        with pytest.raises(kind, match=expected) as caught:
            load_checkpoint(**options)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read it all")
def test_files_without_permission(native: Path) -> None:
    (native / "config.json").unlink()
    for mode in (0o000, 0o100, 0o400):
        native.chmod(mode)
        with pytest.raises(OSError, match=r"Permission denied: .*native") as caught:
            load_checkpoint(native)
        assert "\n" not in str(caught.value)
    native.chmod(0o700)
    (native / "model.safetensors").chmod(0)
    with pytest.raises(PermissionError, match=r"Permission denied: .*model\.safetensors"):
        load_checkpoint(native / "model.safetensors")


@pytest.mark.parametrize("form", ["zip.pt", "legacy.pt", "file.safetensors"])
def test_truncated_files(form: str, tmp_path: Path) -> None:
    path = tmp_path / form
    if form == "file.safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=form == "zip.pt")
    whole = path.read_bytes()
    for kept in (0, 3, 100, len(whole) // 2, int(0.99 * len(whole))):
        path.write_bytes(whole[:kept])
        refused(path, "damaged")


def test_files_of_something_else(tmp_path: Path) -> None:
    for suffix in (".pt", ".bin", ".safetensors"):
        for content in (b"\x00" * 4096, b"PK\x03\x04" * 99, b"ab" * 2000):
            (tmp_path / f"x{suffix}").write_bytes(content)
            refused(tmp_path / f"x{suffix}", "damaged")
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "a.pt", "damaged or not a PyTorch file")
    for suffix in (".txt", ".onnx", ""):
        torch.save(STATE, tmp_path / f"m{suffix}")
        refused(tmp_path / f"m{suffix}", f"suffix '{suffix}' is not one of .pt, .pth, .ckpt")


class Payload:
    """Runs ``touch marker`` when a careless reader unpickles it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle", "in args", "protocol 4"])
def test_pickle_that_wants_to_run_code(form: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    payload = Payload(marker)
    if form in ("plain pickle", "protocol 4"):
        path.write_bytes(pickle.dumps(payload, protocol=4 if form == "protocol 4" else 2))
    elif form == "in args":
        torch.save({"ema": STATE, "args": argparse.Namespace(hook=payload)}, path)
    else:
        torch.save(STATE | {"x": payload}, path, _use_new_zipfile_serialization=form == "zip")
    asks = r"the pickle asks for '(posix|nt)\.system'; only tensors are loaded"
    # torch does not even read the instructions of protocol 4.
    refused(path, r"\(Unsupported operand 149\)" if form == "protocol 4" else asks)
    assert not marker.exists()
    if form == "zip":  # the payload is a real one: a reader without the guard does run it
        torch.load(path, weights_only=False)
        assert marker.exists()


CONTENTS: list[tuple[Any, str]] = [
    (tiny_dit(), "the pickle asks for 'dit_engine.model.DiT'"),
    ([1, 2], "holds a list, not a state dict"),
    (torch.zeros(2), "holds a Tensor, not a state dict"),
    ({"step": 3}, "'step' is a int, not a named tensor"),
    ({0: torch.zeros(1)}, "0 is a Tensor, not a named tensor"),
    ({}, "no DiT, key 'x_embedder.proj.weight' is missing; it holds nothing"),
    ({"w": torch.zeros(2, dtype=torch.int64)}, "'w' is torch.int64"),
    ({"w": torch.eye(2).to_sparse()}, "'w' is torch.float32 .torch.sparse_coo"),
    ({"conv.weight": torch.zeros(2), "b": torch.ones(1)},
     "no DiT, key 'x_embedder.proj.weight' is missing; it holds 'conv.weight', 'b'$"),
    ({k.replace("blocks.1.", "blocks.7."): v for k, v in STATE.items()},
     "block 1 is missing, block 7 is there"),
    (tiny_dit().state_dict(), "hidden size 48 does not tell the number of heads .* give num_heads"),
    *((STATE | {key: torch.zeros(shape)}, message) for key, shape, message in (
        ("blocks.1.attn.qkv.weight", (384, 64),
         r"1 wrong shapes: blocks.1.attn.qkv.weight is \(384, 64\) instead of \(384, 128\)"),
        ("x_embedder.proj.bias", (64,), r"x_embedder.proj.bias is \(64,\) instead of \(128,\)"),
        ("x_embedder.proj.weight", (128, 16), r"x_embedder.proj.weight is \(128, 16\), not of 4"),
        ("x_embedder.proj.weight", (0, 4, 2, 2), r"weight is \(0, 4, 2, 2\), not of 4 dim"),
        ("pos_embed", (1, 17, 128), "pos_embed holds 17 tokens, which is no square"),
        ("final_layer.linear.weight", (30, 128), "gives 30 values a token; patch 2 and 4 channels"),
        ("y_embedder.embedding_table.weight", (1, 128), "num_classes 0 is not a positive integer"),
        ("blocks.0.mlp.fc1.weight", (500, 128), r"fc1.bias is \(512,\) instead of \(500,\)"))),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), CONTENTS, ids=[m[:40] for _, m in CONTENTS])
@pytest.mark.filterwarnings("ignore:hidden size")
def test_contents_of_something_else(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", message)


@pytest.mark.filterwarnings("ignore:hidden size")
def test_missing_and_extra_keys(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "m", tiny_dit(hidden_size=128))
    missing = {f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn.qkv.bias", "mlp.fc2.weight")}
    state = {name: tensor for name, tensor in STATE.items() if name not in missing}
    state |= {"head.weight": torch.zeros(2), "head.bias": torch.zeros(2)}
    for path in (tmp_path / "m" / "model.safetensors", tmp_path / "alone.safetensors"):
        save_file(state, path)
        text = refused(path.parent if path.parent.name == "m" else path, "keys missing")
        assert text.endswith(
            "4 keys missing: 'blocks.0.attn.qkv.bias', 'blocks.0.mlp.fc2.weight', "
            "'blocks.1.attn.qkv.bias' and 1 more; 2 keys too many: 'head.bias', 'head.weight'"
        )


def test_directories_of_something_else(tmp_path: Path) -> None:
    torch.save(tiny_dit().state_dict(), tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "48 is not a multiple of num_heads 5", num_heads=5)
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / ".cache").touch()
    refused(folder, "needs config.json or model_index.json, it holds nothing$")
    with pytest.raises(ValueError, match=r"x: no VAE; it needs config\.json, it holds nothing"):
        load_checkpoint(tmp_path / "m.pt", vae=folder, num_heads=2)
    for name in ("notes.md", "photo.jpg", "a.txt", "z.txt"):
        (folder / name).touch()
    refused(folder, "it holds 'a.txt', 'notes.md', 'photo.jpg' and 1 more")


NUMBER = "is not a finite number above 0$"
FILES: list[tuple[str, Any, str]] = [  # (file of a native directory, its content, the message)
    ("config.json", b'{"_class_name": "BertModel"}', "is of class 'BertModel'; known are DiT, "),
    ("config.json", b'{"model_type": "bert"}', "config.json is of class None"),
    ("config.json", b'{"_class_name": "DiT"', "config.json: not valid JSON"),
    ("config.json", b"[1]", "config.json: holds a list, not a JSON object"),
    ("config.json", b'{"_class_name": "DiT", "depth": 2}', "config key 'hidden_size' is missing"),
    ("config.json", b"\xff\xfe\x00", "not valid JSON"),
    ("config.json", {"colour": 3}, "config key 'colour' is unknown"),
    ("config.json", {"depth": 3}, "the config's depth is 3, the file holds 2 blocks"),
    ("config.json", {"num_heads": 7}, "hidden_size 48 is not a multiple of num_heads 7"),
    ("config.json", {"hidden_size": 96}, "wrong shapes: pos_embed is"),
    *(("config.json", {"mlp_ratio": value}, f"mlp_ratio {value!r} {NUMBER}")
      for value in ("four", True, float("nan"), float("inf"), 0)),
    ("config.json", {"mlp_ratio": 10**30}, "cannot be built"),
    *(("config.json", {"mlp_norm_eps": value}, f"mlp_norm_eps {re.escape(repr(value))} {NUMBER}")
      for value in ("1e-6", False, [1e-06])),
    ("config.json", {"learn_sigma": "no"}, "learn_sigma 'no' is neither True nor False$"),
    ("config.json", {"numerics": "exact"}, "numerics 'exact': choose one of official, diffusers"),
    ("labels.json", b'["ant", "bee"]', "2 label names, 10 classes"),
    ("labels.json", b'{"0": "ant"}', "labels.json: not a list of names"),
    ("labels.json", b"[", "labels.json: not valid JSON"),
    ("model.safetensors", None, "holds no weights; model.safetensors or diffusion_pytorch_model"),
    ("model.safetensors.index.json", b"{}", "holds no weight_map"),
    ("model.safetensors.index.json", b'{"weight_map": {"pos_embed": "gone.bin"}}', r"gone\.bin"),
    *(("model.safetensors.index.json", json.dumps({"weight_map": {"pos_embed": shard}}).encode(),
       "is not a file name") for shard in ("../m.safetensors", "/etc/passwd", "m.bin.index.json")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=lambda v: str(v)[:50])
def test_files_of_a_directory(native: Path, name: str, content: Any, message: str) -> None:
    path = native / name
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content).encode()
    if "model" in name:
        (native / "model.safetensors").unlink()
    if content is not None:
        path.write_bytes(content)
    refused(native, message, FileNotFoundError if message.startswith("gone") else ValueError)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_weights_that_are_not_finite(saved: Path, tmp_path: Path, value: float) -> None:
    for name, part in (("blocks.1.mlp.fc2.weight", 0), ("decoder.conv_out.weight", 1)):
        modules = tiny_dit(), tiny_vae()
        modules[part].get_parameter(name).data.view(-1)[3] = value
        save_pretrained(tmp_path / "m", *modules, NAMES)
        load_checkpoint(tmp_path / "m")  # only on request: it reads every weight
        load_checkpoint(saved, check_finite=True)
        counts = "1 NaN and 0 infinite" if value != value else "0 NaN and 1 infinite"
        for load in (load_checkpoint, load_model)[: 2 - part]:
            with pytest.raises(ValueError, match=f"tensor '{name}' holds {counts} val") as caught:
                load(tmp_path / "m", check_finite=True)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("offline", [True, False])
def test_hub_ids_without_network(
    offline: bool, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)

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
    if offline:
        with pytest.raises(ValueError, match="model 'stabilityai/sd-vae-ft-ema' is no path here"):
            load_checkpoint(saved, vae="stabilityai/sd-vae-ft-ema")
