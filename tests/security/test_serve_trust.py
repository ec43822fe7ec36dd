"""`dit-export triton --serve` runs only the code that this version writes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trust")
    bundle = write_bundle(folder / "onnx", data=True)
    return write_repository(bundle, folder / "repository", ServingOptions(max_batch_size=4))


@pytest.fixture
def repository(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "repository")


def add(name: str, text: str = EVIL) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)

    return change


def append(name: str, text: str) -> Callable[[Path], None]:
    return lambda path: add(name, (path / name).read_text() + text)(path)


def link(name: str, inside: bool) -> Callable[[Path], None]:
    """Move a file away and put a link to it in its place."""

    def change(path: Path) -> None:
        elsewhere = (path if inside else path.parent) / "elsewhere"
        (path / name).rename(elsewhere)
        (path / name).symlink_to(elsewhere)

    return change


def pipe(name: str) -> Callable[[Path], None]:
    """Reading it would wait for ever."""

    def change(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


NONE = "is not part of what this version writes"
DIFFERS = "differs from what this version writes"
ADDED = (  # models, versions, libraries, other configurations, modules and weights
    "evil/1/model.py", "dit/2/model.py", "vae_decoder/1/libtriton_x.so", "dit/configs/h100.pbtxt",
    "dit/1/json.pyc", "numpy.py", "dit/.env", "dit_transformer/1/other.onnx.data",
)  # fmt: skip
# Where a directory is new, it is named.
NEW = {"evil/1/model.py": "evil", "dit/2/model.py": "dit/2", "dit/configs/h100.pbtxt": "dit/conf"}
CHANGED = {
    "dit/1/model.py": EVIL, "dit/1/dit_engine/labels.py": " ", "client.py": EVIL,
    "dit/1/pipeline.json": " ", "vae_decoder/config.pbtxt": 'backend: "python"\n',
}  # fmt: skip
GRAPH, DATA = "vae_decoder/1/model.onnx", "vae_decoder/1/vae_decoder.onnx.data"
LINKED = ("dit", "vae_decoder/1", GRAPH)
# Change → (what is done, the path that the message names, the reason).
STRANGERS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    **{f"added {n}": (add(n), NEW.get(n, n), NONE) for n in ADDED},
    **{f"changed {n}": (append(n, t), n, DIFFERS) for n, t in CHANGED.items()},
    **{f"changed {n}": (append(n, "x"), n, "has changed since") for n in (GRAPH, DATA)},
    **{f"no {n}": (remove(n), n, "is missing") for n in ("dit/1/model.py", GRAPH)},
    **{f"a link {n}": (link(n, inside=False), n, "is a link") for n in LINKED},
    "a link inside": (link("dit/1/dit_engine/labels.py", inside=True), "labels.py", "is a link"),
    **{f"a pipe {n}": (pipe(n), n, NONE) for n in ("dit/1/model.py", GRAPH)},
}


def test_what_is_written_is_served(repository: Path) -> None:
    """Also with another README, and with compiled Python files from an earlier server."""
    before = check_repository(repository)
    append("README.md", "Ours is on the second floor.\n")(repository)
    add("dit/1/__pycache__/model.cpython-311.pyc")(repository)
    add("dit/1/dit_engine/__pycache__/labels.cpython-311.pyc")(repository)
    add(".git/hooks/pre-commit")(repository)
    add(".DS_Store")(repository)
    assert check_repository(repository) == before
    assert before["client.py"] == (repository / "client.py").read_bytes()


@pytest.mark.parametrize("case", STRANGERS)
def test_other_repositories_are_refused(repository: Path, case: str) -> None:
    """Also if their marker lists hashes that fit, except those of a graph: it is anybody's data."""
    change, name, reason = STRANGERS[case]
    change(repository)
    for listed in (False, True)[: 1 if reason == "has changed since" else 2]:
        if listed:
            known = json.loads((repository / MARKER).read_text())["files"]
            change_marker(repository, files=known | hashes(repository))
        said = rf"{name}.*: {reason}|elsewhere: {NONE}"
        with pytest.raises(ValueError, match=said) as caught:
            check_repository(repository)
        message = str(caught.value)
        advice = "again with --overwrite" if reason == "is missing" else "serve it with --trust"
        added = NONE in message and "pipe" not in case
        assert message.endswith(advice) and added == (": move it else" in message)
        assert "\n" not in message


def change_marker(path: Path, **changes: Any) -> None:
    marker = json.loads((path / MARKER).read_text())
    (path / MARKER).write_text(json.dumps(marker | changes))


def hashes(path: Path) -> dict[str, str]:
    """Hashes of all files, as a stranger who knows the format could list them."""
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file() and file.name != MARKER
    }


def test_invalid_facts(repository: Path) -> None:
    """Configurations are made from these facts, which must not add lines to them."""
    marker = json.loads((repository / MARKER).read_text())
    export, options = marker["export"], marker["options"]
    graph = export["graphs"]["vae_decoder"]
    line = {"backend": "python"}

    def with_graph(**changes: Any) -> dict[str, Any]:
        return {"export": export | {"graphs": export["graphs"] | {"vae_decoder": graph | changes}}}

    for changes in (
        {"options": options | {"platform": "python"}},
        {"options": options | {"max_batch_size": line}},
        {"options": options | {"more": 1}},
        {"export": export | {"checkpoint": line}},
        {"export": export | {"vae": None}},
        {"export": export | {"graphs": {}}},
        with_graph(inputs=[graph["inputs"][0] | {"name": line}]),
        {"files": {}},
    ):
        change_marker(repository, **(marker | changes))
        with pytest.raises(ValueError, match=r"repository\.json: cannot be read: ") as caught:
            check_repository(repository)
        assert "\n" not in str(caught.value), changes
    quoted = 'fp16" } backend: "python'
    change_marker(repository, **(marker | {"export": export | {"checkpoint": quoted}}))
    with pytest.raises(ValueError, match=rf"config\.pbtxt: {DIFFERS}"):
        check_repository(repository)


def test_graphs_that_read_other_files(repository: Path, tmp_path: Path) -> None:
    """Anybody can compute their hashes, and a graph can name any file as its weights."""
    (tmp_path / "secret").write_bytes(b"a key")
    onnx = pytest.importorskip("onnx")
    file = repository / "vae_decoder" / "1" / "model.onnx"
    for location in ("../../../secret", str(tmp_path / "secret"), "transformer.onnx.data"):
        weights = onnx.TensorProto(name="w", data_type=onnx.TensorProto.UINT8, dims=[5])
        weights.data_location = onnx.TensorProto.EXTERNAL
        weights.external_data.add(key="location", value=location)
        graph = onnx.helper.make_graph([], "vae_decoder", [], [], [weights])
        file.write_bytes(onnx.helper.make_model(graph).SerializeToString())
        known = json.loads((repository / MARKER).read_text())["files"]
        change_marker(repository, files=known | hashes(repository))
        with pytest.raises(ValueError, match=r"only vae_decoder\.onnx\.data is allowed"):
            check_repository(repository)


def test_a_repository_of_engines(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines count as data: TensorRT runs code from an engine only with an option for it."""
    (tmp_path / "engine").write_bytes(b"engine")
    digest = hashlib.sha256(b"engine").hexdigest()
    monkeypatch.setattr(repository_module, "find_plan", lambda *_: (tmp_path / "engine", digest))
    options = ServingOptions(platform="tensorrt")
    bundle = Bundle.open(made.parent / "onnx")
    path = write_repository(bundle, tmp_path / "plans", options, engines=tmp_path)
    assert "vae_decoder/config.pbtxt" in check_repository(path)
    (path / "vae_decoder" / "1" / "model.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=NONE):
        check_repository(path)


def test_what_another_version_wrote(repository: Path) -> None:
    change_marker(repository, producer="dit-engine 0.0.9\x1b[2J")
    message = r"written by dit-engine 0\.0\.9\\x1b\[2J, not dit-engine .*: write .* --trust$"
    with pytest.raises(ValueError, match=message):
        check_repository(repository)
    change_marker(repository, format=1)
    with pytest.raises(ValueError, match=r"not written by this version of .*--trust$"):
        check_repository(repository)


@pytest.fixture
def server(tmp_path: Path) -> ServerBinary:
    """A stand-in for tritonserver, which writes its arguments to a file and ends."""
    return find_server(fake_server(tmp_path / "opt", f'echo "$@" > {tmp_path}/asked\nexit 3'))


def test_no_server_is_started_of_a_strangers_code(
    repository: Path,
    server: ServerBinary,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither by the command in the README nor by the library, except with --trust."""
    add("dit/1/model.py")(repository)
    monkeypatch.chdir(repository)
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    command = ["triton", "--serve", ".", "--server", str(server.path), *ports]
    assert main(command) == 2
    error = f"error: dit/1/model.py: {DIFFERS}: "
    assert capfd.readouterr().err.startswith(error)
    with pytest.raises(ValueError, match=DIFFERS), running_server(repository, server):
        pass
    assert not (tmp_path / "asked").exists()
    assert main([*command, "--trust"]) == 2
    assert capfd.readouterr().err == "error: the server ended with code 3 before it was ready\n"
    assert f"--model-repository={repository}" in (tmp_path / "asked").read_text()
    assert main(["triton", "--trust"]) == 2
    assert "--trust is an option of --serve" in capfd.readouterr().err
    missing = r"not a model repository; repository\.json is missing"
    with pytest.raises(ValueError, match=missing), running_server(tmp_path, server, trust=True):
        pass


def test_what_is_served_is_what_was_checked(
    repository: Path, server: ServerBinary, tmp_path: Path
) -> None:
    """Python would run a compiled file that fits the time and size of the source beside it."""
    shutil.copytree(repository / "dit", tmp_path / "before")
    copy = f'cp -RL "${{1#--model-repository=}}" {tmp_path}/served; exit 3'
    server.path.write_text(f"#!/bin/sh\n{copy}\n")
    add("dit/1/__pycache__/model.cpython-311.pyc")(repository)
    log = tmp_path / "log"
    with pytest.raises(RuntimeError, match="code 3"), running_server(repository, server, log=log):
        pass
    served = tmp_path / "served"
    assert hashes(served / "dit") == hashes(tmp_path / "before")
    graph = "vae_decoder/1/model.onnx"
    assert (served / graph).read_bytes() == (repository / graph).read_bytes()


def test_engines_are_kept_where_nobody_else_can_put_some(
    server: ServerBinary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines of onnxruntime's TensorRT provider, in the directory that the server runs in."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    options = ServingOptions(accelerator="tensorrt")
    path = write_repository(write_bundle(tmp_path / "onnx"), tmp_path / "repository", options)
    config = (path / "dit_transformer" / "config.pbtxt").read_text()
    assert 'value: "trt-cache"' in config.replace("string_value", "value") and "/tmp" not in config
    server.path.write_text("#!/bin/sh\npwd; readlink trt-cache; exit 3\n")
    with (
        pytest.raises(RuntimeError, match="code 3"),
        running_server(path, server, log=tmp_path / "log"),
    ):
        pass
    here, cache = (tmp_path / "log").read_text().splitlines()
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
    add(".git/config")(repository)
    copy = served_copy(repository, check_repository(repository), tmp_path / "copy")
    names = {file.relative_to(copy).as_posix() for file in copy.rglob("*") if file.is_file()}
    add("vae_decoder/1/libtriton_onnxruntime.so")(repository)
    add("vae_decoder/1/model.py")(repository)
    files = {file.relative_to(copy).as_posix() for file in copy.rglob("*") if file.is_file()}
    assert files == names and "vae_decoder/1/vae_decoder.onnx.data" in names
    assert not any(name.startswith(".git") for name in names)
