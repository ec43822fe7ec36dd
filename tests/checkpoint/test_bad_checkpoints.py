"""Checkpoints that are damaged, hostile or something else: one line names what is wrong."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import NAMES, tiny_dit, tiny_vae

from dit_engine.checkpoint import load_checkpoint, save_pretrained

STATE = tiny_dit(hidden_size=128).state_dict()


def refused(source: Any, message: str, kind: type[Exception] = ValueError, **given: Any) -> str:
    """Loading raises ``kind`` with a single line that matches; no chain of causes is shown."""
    with pytest.raises(kind, match=message) as caught:
        load_checkpoint(source, **given)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "native"
    save_pretrained(path, tiny_dit(), tiny_vae(), NAMES)
    return path


@pytest.mark.parametrize(
    ("name", "message", "kind"),
    [
        ("a/b/c", "'a/b/c' does not exist; give 'builtin', a path or a hub id", FileNotFoundError),
        ("", "'' names nothing; give", ValueError),
        ("~nobody-of-this-name/x.pt", "'~nobody-of-this-name/x.pt': the home", ValueError),
        ("nul\0.pt", r"'nul\\x00.pt' does not exist", FileNotFoundError),
        (b"model.pt", "b'model.pt' names nothing; give", ValueError),
    ],
)
def test_odd_names(name: Any, message: str, kind: type[Exception], saved: Path) -> None:
    refused(name, f"^model {message}", kind)
    refused(saved, f"^vae {message}", kind, vae=name)


@pytest.mark.parametrize("form", ["zip.pt", "legacy.pt", "file.safetensors"])
def test_damaged_files(form: str, tmp_path: Path) -> None:
    path = tmp_path / form
    if form == "file.safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=form == "zip.pt")
    whole = path.read_bytes()
    for kept in (0, 100, int(0.99 * len(whole))):
        path.write_bytes(whole[:kept])
        refused(path, f"{form}: damaged")
    for content in (b"\x00" * 4096, b"PK\x03\x04" * 99):
        path.write_bytes(content)
        refused(path, f"{form}: damaged")


class Payload:
    """Runs ``touch marker`` when a careless reader unpickles it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle", "in args"])
def test_pickle_that_wants_to_run_code(form: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    payload = Payload(marker)
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(payload, protocol=2))
    elif form == "in args":
        torch.save({"ema": STATE, "args": argparse.Namespace(hook=payload)}, path)
    else:
        torch.save(STATE | {"x": payload}, path, _use_new_zipfile_serialization=form == "zip")
    asks = r"the pickle asks for '(posix|nt)\.system'; only tensors are loaded"
    refused(path, asks)
    assert not marker.exists()
    if form == "zip":  # the payload is a real one: a reader without the guard does run it
        torch.load(path, weights_only=False)
        assert marker.exists()


CONTENTS: list[tuple[Any, str]] = [
    ([1, 2], "holds a list, not a state dict"),
    ({0: torch.zeros(1)}, "0 is a Tensor, not a named tensor"),
    ({"w": torch.zeros(2, dtype=torch.int64)}, "'w' is torch.int64"),
    ({"w": torch.eye(2).to_sparse()}, "_get_layout'; only dense tensors"),
    ({"conv.weight": torch.zeros(2), "b": torch.ones(1)},
     "no DiT, key 'x_embedder.proj.weight' is missing; it holds 'conv.weight', 'b'$"),
    ({k.replace("blocks.1.", "blocks.7."): v for k, v in STATE.items()},
     "block 1 is missing, block 7 is there"),
    *((STATE | {key: torch.zeros(shape)}, message) for key, shape, message in (
        ("x_embedder.proj.weight", (0, 4, 2, 2), r"weight is \(0, 4, 2, 2\), not of 4 dim"),
        ("pos_embed", (1, 17, 128), "pos_embed holds 17 tokens, which is no square"),
        ("final_layer.linear.weight", (30, 128), "gives 30 values a token; patch 2 and 4 channels"),
        ("blocks.0.mlp.fc1.weight", (500, 128), r"fc1.bias is \(512,\) instead of \(500,\)"))),
    ({k: v for k, v in STATE.items() if k != "x_embedder.proj.bias"} | {"head": torch.zeros(2)},
     "m.pt: 1 keys missing: 'x_embedder.proj.bias'; 1 keys too many: 'head'$"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), CONTENTS, ids=[m[:40] for _, m in CONTENTS])
@pytest.mark.filterwarnings("ignore:hidden size")
def test_contents_of_something_else(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", message)


def test_directories_of_something_else(tmp_path: Path, saved: Path) -> None:
    (tmp_path / ".cache").touch()
    refused(tmp_path, "needs config.json or model_index.json, it holds nothing$")
    refused(saved, r"no VAE; it needs config\.json, it holds nothing", vae=tmp_path)
    refused(saved, "48 is not a multiple of num_heads 5", num_heads=5)


INDEX = "model.safetensors.index.json"
FILES: list[tuple[str, Any, str]] = [  # (file of a native directory, its content, the message)
    ("config.json", b'{"_class_name": "BertModel"}', "is of class 'BertModel'; known are DiT, "),
    ("config.json", b"[1]", "config.json: holds a list, not a JSON object"),
    ("config.json", b'{"_class_name": "DiT", "depth": 2}', "config key 'hidden_size' is missing"),
    ("config.json", {"colour": 3}, "config key 'colour' is unknown"),
    ("config.json", {"depth": 3}, "the config's depth is 3, the file holds 2 blocks"),
    ("config.json", {"mlp_ratio": float("nan")}, "mlp_ratio nan is not a finite number above 0$"),
    ("config.json", {"learn_sigma": "no"}, "learn_sigma 'no' is neither True nor False$"),
    ("labels.json", b'["ant", "bee"]', "2 label names, 10 classes"),
    ("labels.json", b'{"0": "ant"}', "labels.json: not a list of names"),
    ("model.safetensors", None, "holds no weights; model.safetensors or diffusion_pytorch_model"),
    (INDEX, b'{"weight_map": {"x": "../m.safetensors"}}', "is not a file name"),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=lambda v: str(v)[:50])
def test_files_of_a_directory(
    saved: Path, tmp_path: Path, name: str, content: Any, message: str
) -> None:
    native = shutil.copytree(saved, tmp_path / "native")
    if isinstance(content, dict):
        content = json.dumps(json.loads((native / name).read_text()) | content).encode()
    if "model" in name:
        (native / "model.safetensors").unlink()
    if content is not None:
        (native / name).write_bytes(content)
    assert "native" in refused(native, message)


@pytest.mark.parametrize("part", ["blocks.1.mlp.fc2.weight", "decoder.conv_out.weight"])
def test_weights_that_are_not_finite(part: str, tmp_path: Path) -> None:
    model, vae = tiny_dit(), tiny_vae()
    save_pretrained(tmp_path, model, vae)
    load_checkpoint(tmp_path, check_finite=True)
    weights = (vae if part.startswith("decoder") else model).get_parameter(part).data.view(-1)
    weights[3:6] = torch.tensor([float("nan"), -float("inf"), float("inf")])
    save_pretrained(tmp_path, model, vae)
    load_checkpoint(tmp_path)  # only on request: it reads every weight
    refused(tmp_path, f"tensor '{part}' holds 1 NaN and 2 infinite values", check_finite=True)


def test_hub_ids_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))
    said = "'facebook/DiT-XL-2-256' is no path here, and the Hugging Face hub did not give it"
    refused("facebook/DiT-XL-2-256", f"^model {said}.*outgoing traffic has been disabled")
