"""Export directories: what is read, what is refused, and that one replaces another only when asked.

What of others is never removed is in tests/security/test_deletion.py.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from tiny import NAMES, tiny_dit

from dit_engine.io.directories import new_directory
from dit_export.bundle import Bundle, Graph, TensorSpec, replaceable, write_manifest

GRAPH = Graph(
    "denoiser", "denoiser.onnx", "fp32",
    (TensorSpec("x", "float32", ("batch", 4, 8, 8)), TensorSpec("t", "int64", ("batch",))),
    (TensorSpec("output", "float32", ("batch", 8, 8, 8)),),
    {"against": "torch", "relative": 1e-7, "bound": 1e-5}, ("onnx.checker",),
)  # fmt: skip


def write(directory: Path, content: bytes = b"weights", overwrite: bool = False) -> Path:
    """A bundle of one graph, whose file holds ``content``."""
    facts = {
        "model": tiny_dit().config.to_dict(), "vae": None, "checkpoint": "a" * 64,
        "vae_checkpoint": None, "dtype": "fp32", "opset": 23, "target": "onnxruntime",
        "guided_channels": 3, "label_names": list(NAMES),
    }  # fmt: skip
    with new_directory(directory, replaceable(overwrite)) as partial:
        (partial / "denoiser.onnx").write_bytes(content)
        write_manifest(partial, facts, [GRAPH])
    return directory


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "out")
    bundle = Bundle.open(path)
    assert bundle.config == tiny_dit().config and bundle.vae is None
    assert bundle.label_names == NAMES and bundle.graphs == {"denoiser": GRAPH}
    assert bundle.file("denoiser") == path / "denoiser.onnx"
    digest = hashlib.sha256(b"weights").hexdigest()
    assert bundle.manifest["files"] == {"denoiser.onnx": {"bytes": 7, "sha256": digest}}
    with pytest.raises(ValueError, match=r"no graph 'vae_decoder'; it holds denoiser$"):
        bundle.file("vae_decoder")
    bundle.file("denoiser").write_bytes(b"Weights")
    with pytest.raises(ValueError, match=r"denoiser\.onnx: has changed since the export"):
        Bundle.open(path)
    assert Bundle.open(path, verify=False).dtype == "fp32"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, r"format 2; 1 is what is read$"),
        ({"label_names": ["ant"]}, r"cannot be read: .*1 label names for 10 classes"),
        ({"producer": "someone"}, r"not written by dit-export$"),
        ({"files": {}}, r"denoiser\.onnx is not among the files$"),
        (None, "not an export; manifest.json is missing"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(
    tmp_path: Path, changes: dict[str, object] | None, message: str
) -> None:
    file = write(tmp_path / "out") / "manifest.json"
    if changes is None:
        file.unlink()
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message) as caught:
        Bundle.open(tmp_path / "out")
    assert str(file.parent) in str(caught.value) and "\n" not in str(caught.value)


def test_another_export_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds an export already; --overwrite"):
        write(path, b"other")
    assert (path / "denoiser.onnx").read_bytes() == b"weights"
    write(path, b"other", overwrite=True)
    assert Bundle.open(path).file("denoiser").read_bytes() == b"other"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
