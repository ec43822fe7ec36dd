"""`dit-export triton --serve` runs only the code that this version writes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from bundles import write_bundle
from fake_server import fake_server

from dit_engine.io.caches import VARIABLE
from dit_export.bundle import Bundle
from dit_export.cli import main
from dit_export.server import repository as repository_module
from dit_export.server.binary import ServerBinary, find_server
from dit_export.server.configuration import ServingOptions
from dit_export.server.process import running_server
from dit_export.server.repository import MARKER, write_repository
from dit_export.server.trust import check_repository, served_copy

EVIL = "raise SystemExit('a stranger was here')\n"
NONE = "is a link or not part of what this version writes"
DIFFERS = "differs from what this version writes"
GRAPH, DATA = "vae_decoder/1/model.onnx", "vae_decoder/1/vae_decoder.onnx.data"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trust")
    bundle = write_bundle(folder / "onnx", data=True)
    return write_repository(bundle, folder / "repository", ServingOptions(max_batch_size=4))


@pytest.fixture
def repository(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "repository")


def add(file: Path, text: str = EVIL) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as opened:
        opened.write(text)


def change(file: Path) -> None:
    """The size stays."""
    file.write_bytes(file.read_bytes()[:-1] + b"#")


def link(file: Path) -> None:
    """Move a file away and put a link to it in its place."""
    elsewhere = file.parents[3] / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def pipe(file: Path) -> None:
    """Reading it would wait for ever."""
    file.unlink()
    os.mkfifo(file)


STRANGERS: list[tuple[Callable[[Path], object], str, str]] = [
    *((add, name, NONE) for name in (
        "evil/1/model.py", "dit/2/model.py", "vae_decoder/1/libtriton_x.so", "numpy.py",
        "dit/configs/h100.pbtxt", "dit/1/json.pyc", "dit/.env")),
    *((add, name, DIFFERS) for name in (
        "dit/1/model.py", "dit/1/dit_engine/labels.py", "client.py", "dit/1/pipeline.json",
        "vae_decoder/config.pbtxt")),
    *((change, name, DIFFERS) for name in ("client.py", "dit/config.pbtxt")),
    *((change, name, "has changed since") for name in (GRAPH, DATA)),
    *((Path.unlink, name, "is missing") for name in ("dit/1/model.py", GRAPH)),
    *((link, name, NONE) for name in (GRAPH, "dit/1/model.py", "dit/1/dit_engine")),
    *((pipe, name, NONE) for name in ("dit/1/model.py", GRAPH)),
]  # fmt: skip


def test_what_is_written_is_served(repository: Path) -> None:
    """Also with another README, and with compiled Python files from an earlier server."""
    before = check_repository(repository)
    for name in ("README.md", "dit/1/__pycache__/model.cpython-311.pyc", ".git/hooks/pre-commit",
                 "dit/1/dit_engine/__pycache__/labels.cpython-311.pyc", ".DS_Store"):  # fmt: skip
        add(repository / name)
    assert check_repository(repository) == before
    assert before["client.py"] == (repository / "client.py").read_bytes()


def test_other_repositories_are_refused(made: Path, tmp_path: Path) -> None:
    """Also if their marker lists hashes that fit, except those of a graph: it is anybody's data."""
    for i, (harm, name, reason) in enumerate(STRANGERS):
        path = shutil.copytree(made, tmp_path / str(i) / "repository")
        harm(path / name)
        for listed in (False, True)[: 1 if reason == "has changed since" else 2]:
            if listed:
                change_marker(path, files=marker(path)["files"] | hashes(path))
            with pytest.raises(ValueError, match=f"{name}.*: {reason}") as caught:
                check_repository(path)
            assert "\n" not in str(caught.value)


def marker(path: Path) -> dict[str, Any]:
    return json.loads((path / MARKER).read_text())


def change_marker(path: Path, **changes: Any) -> None:
    (path / MARKER).write_text(json.dumps(marker(path) | changes))


def hashes(path: Path) -> dict[str, str]:
    """Hashes of all files, as a stranger who knows the format could list them."""
    return {
        file.relative_to(path).as_posix(): sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file() and file.name != MARKER
    }


def test_invalid_facts(repository: Path) -> None:
    """Configurations are made from these facts, which must not add lines to them."""
    said = marker(repository)
    export, options, line = said["export"], said["options"], {"backend": "python"}
    for changes, message in (
        ({"options": options | {"max_batch_size": line}}, "cannot be read: "),
        ({"options": options | {"more": 1}}, "cannot be read: "),
        ({"export": export | {"checkpoint": line}}, "cannot be read: "),
        ({"export": export | {"vae": None}}, "cannot be read: "),
        ({"export": export | {"graphs": {}}}, "cannot be read: "),
        ({"files": {}}, "cannot be read: "),
        ({"export": export | {"checkpoint": 'fp16" } backend: "python'}}, DIFFERS),
        ({"producer": "dit-engine 0.0.9\x1b[2J"}, r"written by dit-engine 0\.0\.9\\x1b\[2J, not "),
        ({"format": 1}, r"not written by this version of .*--trust$"),
    ):
        change_marker(repository, **(said | changes))
        with pytest.raises(ValueError, match=message) as caught:
            check_repository(repository)
        assert "\n" not in str(caught.value), changes


def test_graphs_that_read_other_files(repository: Path) -> None:
    """Anybody can compute their hashes, and a graph can name any file as its weights."""
    onnx = pytest.importorskip("onnx")
    weights = onnx.TensorProto(name="w", data_type=onnx.TensorProto.UINT8, dims=[5])
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="../../../secret")
    graph = onnx.helper.make_graph([], "vae_decoder", [], [], [weights])
    (repository / GRAPH).write_bytes(onnx.helper.make_model(graph).SerializeToString())
    change_marker(repository, files=marker(repository)["files"] | hashes(repository))
    with pytest.raises(ValueError, match=r"only vae_decoder\.onnx\.data is allowed"):
        check_repository(repository)


def test_a_repository_of_engines(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines count as data: TensorRT runs code from an engine only with an option for it."""
    (tmp_path / "engine").write_bytes(b"engine")
    digest = sha256(b"engine").hexdigest()
    monkeypatch.setattr(repository_module, "find_plan", lambda *_: (tmp_path / "engine", digest))
    options = ServingOptions(platform="tensorrt")
    bundle = Bundle.open(made.parent / "onnx")
    path = write_repository(bundle, tmp_path / "plans", options, engines=tmp_path)
    assert "vae_decoder/config.pbtxt" in check_repository(path)
    add(path / GRAPH)
    with pytest.raises(ValueError, match=NONE):
        check_repository(path)


@pytest.fixture
def server(tmp_path: Path) -> ServerBinary:
    """A stand-in for tritonserver, which writes its arguments to a file and ends."""
    return find_server(fake_server(tmp_path / "opt", f'echo "$@" > {tmp_path}/asked\nexit 3'))


def test_no_server_is_started_of_a_strangers_code(
    repository: Path, server: ServerBinary, tmp_path: Path,
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Neither by the command in the README nor by the library, except with --trust."""
    add(repository / "dit/1/model.py")
    monkeypatch.chdir(repository)
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    command = ["triton", "--serve", ".", "--server", str(server.path), *ports]
    assert main(command) == 2
    assert capfd.readouterr().err.startswith(f"error: dit/1/model.py: {DIFFERS}: ")
    assert not (tmp_path / "asked").exists()
    assert main([*command, "--trust"]) == 2
    assert capfd.readouterr().err == "error: the server ended with code 3 before it was ready\n"
    assert f"--model-repository={repository}" in (tmp_path / "asked").read_text()
    missing = r"not a model repository; repository\.json is missing"
    with pytest.raises(ValueError, match=missing), running_server(tmp_path, server, trust=True):
        pass


def test_what_is_served_is_what_was_checked(
    repository: Path, server: ServerBinary, tmp_path: Path
) -> None:
    """Python would run a compiled file that fits the time and size of the source beside it."""
    before = hashes(repository / "dit")
    copy = f'cp -RL "${{1#--model-repository=}}" {tmp_path}/served; exit 3'
    server.path.write_text(f"#!/bin/sh\n{copy}\n")
    add(repository / "dit/1/__pycache__/model.cpython-311.pyc")
    with pytest.raises(OSError, match="code 3"), running_server(repository, server):
        pass
    served = tmp_path / "served"
    assert hashes(served / "dit") == before
    assert (served / GRAPH).read_bytes() == (repository / GRAPH).read_bytes()


def test_engines_are_kept_where_nobody_else_can_put_some(
    server: ServerBinary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines of onnxruntime's TensorRT provider, in the directory that the server runs in."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    options = ServingOptions(accelerator="tensorrt")
    path = write_repository(write_bundle(tmp_path / "onnx"), tmp_path / "repository", options)
    server.path.write_text("#!/bin/sh\npwd; readlink trt-cache; exit 3\n")
    lines: list[str] = []
    with (
        pytest.raises(OSError, match="code 3"),
        running_server(path, server, show=lines.append),
    ):
        pass
    here, cache = lines
    assert Path(cache) == tmp_path / "cache" / "triton" and not Path(here).exists()
    assert Path(cache).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("hard", [True, False], ids=["hard links", "symbolic links"])
def test_what_is_added_after_the_check_is_not_served(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("another file system")

    if not hard:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    copy = served_copy(repository, check_repository(repository), tmp_path / "copy")
    names = {file.relative_to(copy).as_posix() for file in copy.rglob("*") if file.is_file()}
    add(repository / "vae_decoder/1/model.py")
    files = {file.relative_to(copy).as_posix() for file in copy.rglob("*") if file.is_file()}
    assert files == names and DATA in names
