"""Export directories: written whole or not at all, and read only as they were written."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from tiny import NAMES, tiny_dit

from dit_engine.io.directories import check_destination, new_directory
from dit_export.bundle import Bundle, Graph, TensorSpec, replaceable, write_manifest

GRAPH = Graph(
    "denoiser", "denoiser.onnx", "fp32",
    (TensorSpec("x", "float32", ("batch", 4, 8, 8)),),
    (TensorSpec("output", "float32", ("batch", 8, 8, 8)),),
    {"against": "torch", "relative": 1e-6, "bound": 1e-5}, None, ("a checker",),
)  # fmt: skip


def write(directory: Path, content: bytes = b"weights", overwrite: bool = False) -> Path:
    facts = {
        "model": tiny_dit().config.to_dict(), "vae": None, "checkpoint": "abc", "dtype": "fp32",
        "opset": 23, "target": "onnxruntime", "guided_channels": 3, "label_names": [*NAMES],
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
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert listed == {
        "denoiser.onnx": {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    }
    with pytest.raises(ValueError, match=r"no graph 'vae_decoder'; it holds denoiser$"):
        bundle.file("vae_decoder")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Weights", r"denoiser\.onnx: has changed since the export \(SHA-256 differs\)$"),
        (b"weights and more", r"denoiser\.onnx: 16 bytes, where manifest\.json has 7$"),
        (None, r"denoiser\.onnx: is missing$"),
    ],
)
def test_a_tampered_file_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = write(tmp_path / "out")
    (path / "denoiser.onnx").unlink()
    if content is not None:
        (path / "denoiser.onnx").write_bytes(content)
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
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    file = write(tmp_path / "out") / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message) as caught:
        Bundle.open(tmp_path / "out")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r": not an export; manifest\.json is missing$"):
            Bundle.open(path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: not valid JSON \("):
        Bundle.open(tmp_path)


def test_another_export_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"holds an export already \(fp32 for onnxruntime\); --overwrite replaces"
    ):
        write(path, b"other")
    assert (path / "denoiser.onnx").read_bytes() == b"weights"
    write(path, b"other", overwrite=True)
    assert (path / "denoiser.onnx").read_bytes() == b"other" and only(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_anything_else_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")  # an empty directory is free
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match=r"out: holds something else \(thesis\.txt\); nothing was"):
        write(tmp_path / "out", overwrite=overwrite)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "file").touch()
    for name, reason in (("link", "holds something else"), ("file", "and is not a directory")):
        with pytest.raises(ValueError, match=rf"{reason}.*; nothing was written$"):
            write(tmp_path / name, overwrite=overwrite)
    assert only(tmp_path) == ["file", "link", "out"] and only(tmp_path / "out") == ["thesis.txt"]


@pytest.mark.parametrize("earlier", [False, True])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    path = tmp_path / "out"
    if earlier:
        write(path)

    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)  # the manifest, after the graph
    with pytest.raises(OSError, match="No space left"):
        write(path, b"other", overwrite=True)
    assert only(tmp_path) == (["out"] if earlier else [])
    if earlier:
        assert Bundle.open(path).file("denoiser").read_bytes() == b"weights"


def test_a_failed_rename_puts_the_earlier_export_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename = write(tmp_path / "out"), Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        write(path, b"other", overwrite=True)
    assert only(tmp_path) == ["out"] and (path / "denoiser.onnx").read_bytes() == b"weights"


def test_what_was_not_made_with_an_export_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("manifest.json", "a.onnx", "sub/mine.txt"):
        (tmp_path / name).write_text("x")
    known = dict.fromkeys(["manifest.json", "a.onnx", "sub/mine.txt"])
    assert check_destination(tmp_path, lambda _: known).keys() == known.keys()
    del known["sub/mine.txt"]
    with pytest.raises(
        ValueError, match=r": also holds what was not made with it \(sub/mine.txt\): move that"
    ):
        check_destination(tmp_path, lambda _: known)
