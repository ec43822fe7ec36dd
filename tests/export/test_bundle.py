"""Export directories: what is read, what is refused, and what is never overwritten."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from tiny import NAMES, tiny_dit

from dit_engine.io.directories import check_destination, new_directory
from dit_export.bundle import Bundle, Graph, TensorSpec, replaceable, write_manifest

GRAPH = Graph(
    "denoiser", "denoiser.onnx", "fp32",
    (TensorSpec("x", "float32", ("batch", 4, 8, 8)), TensorSpec("t", "int64", ("batch",))),
    (TensorSpec("output", "float32", ("batch", 8, 8, 8)),),
    {"against": "torch", "relative": 1e-7, "bound": 1e-5}, None, ("onnx.checker",),
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


def only(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "deep" / "out")
    bundle = Bundle.open(path)
    assert only(tmp_path / "deep") == ["out"]
    assert bundle.config == tiny_dit().config and bundle.vae is None
    assert bundle.label_names == NAMES and bundle.graphs == {"denoiser": GRAPH}
    assert bundle.file("denoiser") == path / "denoiser.onnx"
    digest = hashlib.sha256(b"weights").hexdigest()
    assert bundle.manifest["files"] == {"denoiser.onnx": {"bytes": 7, "sha256": digest}}
    with pytest.raises(ValueError, match=r"no graph 'vae_decoder'; it holds denoiser$"):
        bundle.file("vae_decoder")
    for content, message in (
        (b"Weights", r"denoiser\.onnx: has changed since the export \(SHA-256 differs\)$"),
        (b"weights and more", r"denoiser\.onnx: 16 bytes, where manifest\.json has 7$"),
        (None, r"denoiser\.onnx: is missing$"),
    ):
        bundle.file("denoiser").unlink()
        if content is not None:
            bundle.file("denoiser").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Bundle.open(path)
        assert Bundle.open(path, verify=False).dtype == "fp32"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, r"format 2; 1 is what is read$"),
        ({"label_names": ["ant"]}, r"cannot be read: .*1 label names for 10 classes"),
        ({"producer": "someone"}, r"not written by dit-export$"),
        ({"files": 5}, r"not written by dit-export$"),
        ({"model": {"depth": 2}}, r"cannot be read: .*'hidden_size' is missing"),
        ({"files": {"../denoiser.onnx": {"bytes": 1, "sha256": "0"}}}, r"not a file name"),
        ({"files": {}}, r"denoiser\.onnx is not among the files$"),
        ({"graphs": {"denoiser": {}}}, r"graphs\['denoiser'\] has no 'file'$"),
        (None, r"manifest\.json: not valid JSON \("),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(
    tmp_path: Path, changes: dict[str, object] | None, message: str
) -> None:
    file = write(tmp_path / "out") / "manifest.json"
    changed = "{" if changes is None else json.dumps(json.loads(file.read_text()) | changes)
    file.write_text(changed)
    with pytest.raises(ValueError, match=message) as caught:
        Bundle.open(tmp_path / "out")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r": not an export; manifest\.json is missing$"):
            Bundle.open(path)


def test_another_export_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "out")
    with pytest.raises(ValueError, match=r"export already \(fp32 for onnxruntime\); --overwrite"):
        write(path, b"other")
    assert (path / "denoiser.onnx").read_bytes() == b"weights"
    write(path, b"other", overwrite=True)
    assert (path / "denoiser.onnx").read_bytes() == b"other" and only(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_anything_else_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    out, known = tmp_path / "out", ["manifest.json", "a.onnx", "sub/mine.txt"]
    (out / "sub").mkdir(parents=True)
    for name in known:
        (out / name).write_text("x")
    assert check_destination(out, lambda _: dict.fromkeys(known)).keys() == set(known)
    with pytest.raises(ValueError, match=r": also holds what was not made with it \(sub/mine.txt"):
        check_destination(out, lambda _: dict.fromkeys(known[:2]))
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "file").touch()
    for name, reason in (
        ("out", r"out: holds something else \(a\.onnx, manifest\.json, sub\)"),
        ("link", "holds something else"),
        ("file", "and is not a directory"),
    ):
        with pytest.raises(ValueError, match=rf"{reason}.*; nothing was written$"):
            write(tmp_path / name, overwrite=overwrite)
    assert only(tmp_path) == ["file", "link", "out"]
    assert only(out) == ["a.onnx", "manifest.json", "sub"]


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("failing", ["write_text", "rename"])
def test_a_full_disk_or_a_failed_rename_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool, failing: str
) -> None:
    """The manifest is written after the graph; the directory is renamed last."""
    path, original = tmp_path / "out", getattr(Path, failing)
    if earlier:
        write(path)

    def failed(self: Path, *arguments: object, **options: object) -> object:
        if failing == "rename" and not self.name.endswith(".partial"):
            return original(self, *arguments, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, failing, failed)
    with pytest.raises(OSError, match="No space left"):
        write(path, b"other", overwrite=True)
    assert only(tmp_path) == (["out"] if earlier else [])
    if earlier:
        assert Bundle.open(path).file("denoiser").read_bytes() == b"weights"
