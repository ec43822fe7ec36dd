"""What web pages and other accounts on the machine can do with the server of `--serve`."""

from __future__ import annotations

import http.client
import json
import os
import re
import stat
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bundles import write_bundle
from fake_server import ready_server
from serving import Served

from dit_export.server import origin, supervisor
from dit_export.server.binary import find_server
from dit_export.server.origin import refusal
from dit_export.server.process import Running, running_server
from dit_export.server.repository import write_repository

REGIONS = Path("/dev/shm")
linux = pytest.mark.skipif(not REGIONS.is_dir(), reason="shared memory lies elsewhere here")


def ask(
    address: str, path: str, body: bytes | None = None, method: str = "", **headers: str
) -> tuple[int, str]:
    """Status and text of an answer; headers: Host and Origin among them."""
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.putrequest(method or ("GET" if body is None else "POST"), path, "Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    return answer.status, answer.read().decode("utf-8", "replace")


def tensor(name: str, datatype: str, *data: Any, shape: tuple[int, ...] = ()) -> dict[str, Any]:
    return {"name": name, "shape": shape or (len(data), 1), "datatype": datatype, "data": data}


def body(*inputs: dict[str, Any], **parameters: str) -> bytes:
    return json.dumps({"inputs": inputs, "parameters": parameters}).encode()


ONE = (tensor("labels", "INT64", 1), tensor("seeds", "INT64", 1), tensor("steps", "INT64", 1))
LATENT = tensor("z", "FP32", *[0.0] * 256, shape=(1, 4, 8, 8))


CLOSED = (
    "GET /v2/systemsharedmemory/status", "POST /v2/systemsharedmemory/region/x/register",
    "POST /v2/systemsharedmemory/unregister", "POST /v2/cudasharedmemory/region/x/register",
    "POST /v2/repository/index", "POST /v2/repository/models/dit/load",
    "POST /v2/repository/models/dit/unload", "GET /v2/logging", "POST /v2/logging",
    "GET /v2/trace/setting", "POST /v2/models/dit/trace/setting",
)  # fmt: skip


def test_unused_http_endpoints_are_closed(served: Served) -> None:
    content = b'{"log_file": "/tmp/x", "key": "/x", "offset": 0, "byte_size": 8}'
    for method, path in map(str.split, CLOSED):
        for headers in ({}, {"for": "nobody"}, {"Host": "localhost", "nobody": ""}):
            status, text = ask(served.running.http, path, content, method, **headers)
            assert status == 403 and "restricted" in text, (path, status, text)


def test_unused_grpc_endpoints_are_closed(served: Served) -> None:
    module = pytest.importorskip("tritonclient.grpc")
    with module.InferenceServerClient(served.running.grpc) as client:
        for question in (
            lambda: client.register_system_shared_memory("x", "/x", 8),
            lambda: client.get_system_shared_memory_status(),
            lambda: client.unregister_system_shared_memory(),
            lambda: client.get_cuda_shared_memory_status(),
            lambda: client.get_model_repository_index(),
            lambda: client.load_model("dit"),
            lambda: client.unload_model("dit"),
            lambda: client.update_log_settings({"log_file": "/tmp/x"}),
            lambda: client.get_trace_settings(),
        ):
            with pytest.raises(module.InferenceServerException, match="protocol is restricted"):
                question()


@linux
def test_the_key_can_be_read_and_not_be_sent(served: Served) -> None:
    """Any user of the machine can read the key among the server's arguments."""
    arguments = command_line(served.running)
    keys = [arg.partition("=")[2] for arg in arguments if re.match("--(http|grpc)-restrict", arg)]
    assert len(keys) == len(set(keys)) == 2
    for key in keys:
        endpoints, _, rest = key.partition(":")
        name, _, value = rest.partition("=")
        assert endpoints == "shared-memory,model-repository,trace,logging" and len(value) > 40
        raw = f"GET /v2/logging HTTP/1.1\r\nHost: localhost\r\n{name}: {value}\r\n\r\n"
        assert b" 403 " in send(served.running.http, raw.encode())
        folded = f"GET /v2/logging HTTP/1.1\r\nHost: localhost\r\nx: y\r\n {name}: {value}\r\n\r\n"
        assert b" 200 " not in send(served.running.http, folded.encode())


def send(address: str, raw: bytes) -> bytes:
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.connect()
    connection.send(raw)
    assert connection.sock is not None
    answer = connection.sock.recv(4096)
    connection.close()
    return answer


@pytest.mark.parametrize("model", ["dit", "vae_decoder"])
def test_requests_of_web_pages_are_refused(served: Served, model: str) -> None:
    """A page can send plain text anywhere; if its own name points here, it can read the answer."""
    address, path = served.running.http, f"/v2/models/{model}/infer"
    inputs = ONE if model == "dit" else (LATENT,)
    port = address.rpartition(":")[2]
    for headers in (
        {"Origin": "http://page.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:3000"},
        {"origin": "http://6.6.6.6", "Content_Type": "text/plain"},
        {"Host": "page.example"},
        {"Host": f"page.example:{port}", "Origin": f"http://page.example:{port}"},
        {"Host": "127.0.0.1.page.example"},
    ):
        for parameters in ({}, {"host": "localhost", "origin": f"http://{address}"}):
            status, text = ask(address, path, body(*inputs, **parameters), **headers)
            assert status == 400 and re.search("Origin|Host", text), (headers, status, text)
    for name in (f"localhost:{port}", "LOCALHOST", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert ask(address, path, body(*inputs), Host=name)[0] == 200
    same = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
    assert ask(address, path, body(*inputs), **same)[0] == 200


def test_generate_is_closed(served: Served) -> None:
    """Of /generate no headers are forwarded, and its keys must not pass for some."""
    names = ("x", "host", "Host", "HOST", "hOst", "HoSt", "user-agent", "User-Agent", "USER-AGENT")
    asked = {"labels": 1, "seeds": 1, "steps": 1}
    forged = [{name: "localhost"} for name in names]
    forged += [{"parameters": each} for each in forged] + [dict.fromkeys(names, "localhost")]
    for more in (*forged, {"host\0": "localhost"}, {"host": "localhost", "host\0": "localhost"}):
        for kind in ("generate", "generate_stream"):
            content, path = json.dumps(asked | more).encode(), f"/v2/models/dit/{kind}"
            status, text = ask(served.running.http, path, content, Host="page.example")
            assert "images" not in text and (status != 200 or "error" in text), (more, text)


def test_the_graphs_are_not_closed_to_generate(served: Served) -> None:
    """A known limit, as SECURITY.md says: a page can make the server run them."""
    content = json.dumps({"z": [0.0] * 256}).encode()
    path = "/v2/models/vae_decoder/generate"
    assert ask(served.running.http, path, content, Host="page.example")[0] == 200


ALLOWED: tuple[dict[str, Any], ...] = (
    {}, {"Host": "localhost"}, {"host": "localhost:8000"}, {"HOST": "a.localhost."},
    {"host": "[fe80::1]:8000"}, {"host": "192.168.1.7:8000"}, {"host": "box:8000"},
    {"host": "Box.Example"}, {"host": "localhost", "origin": "http://localhost"},
    {"host": "localhost", "ORIGIN": "https://localhost"},
)  # fmt: skip
FOREIGN: tuple[tuple[dict[str, Any], str], ...] = (
    ({"host": "box.example.org"}, "Host"), ({"host": "localhost.example"}, "Host"),
    ({"host": "1.2.3.4.example:80"}, "Host"), ({"host": ""}, "Host"), ({"host": 5}, "Host"),
    ({"host": "localhost\x1b[2J"}, r"Host 'localhost\\x1b"),
    ({"origin": "http://localhost"}, "Origin"),
    ({"host": "localhost", "origin": "http://localhost:1"}, "Origin"),
    ({"host": "localhost", "origin": True}, "Origin"),
)  # fmt: skip


def test_hosts_and_origins(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton forwards them to a model; a client may write their names in any case."""
    monkeypatch.setenv(origin.NAMES, "box,box.example,")
    for said in ALLOWED:
        assert refusal(SimpleNamespace(parameters=lambda said=said: json.dumps(said))) is None
    for said, reason in FOREIGN:
        found = refusal(SimpleNamespace(parameters=lambda said=said: json.dumps(said)))
        assert re.match(reason, found or ""), said


def test_a_parameter_does_not_replace_a_header() -> None:
    for said in (
        '{"host": "page.example", "host": "localhost"}',
        '{"host": "localhost", "host": "page.example"}',
        '{"host": "6.6.6.6", "origin": "http://6.6.6.6", "host": "localhost"}',
    ):
        assert refusal(SimpleNamespace(parameters=lambda said=said: said))


def test_requests_without_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused if the server forwards headers. Requests between models have none."""
    nothing, grpc = (SimpleNamespace(parameters=lambda t=t: t) for t in ("{}", '{"user-agent":""}'))
    monkeypatch.setenv(origin.NAMES, "box")
    assert refusal(nothing, named=True) is None
    monkeypatch.setenv(origin.FORWARDS, "1")
    assert refusal(nothing, named=True) and not refusal(nothing) and not refusal(grpc, named=True)


LONG = "x" * 4_000_000


LARGE: tuple[tuple[tuple[dict[str, Any], ...], str], ...] = (
    ((tensor("label_names", "BYTES", LONG), ONE[1]), "label 'x{78,79}… is unknown"),
    ((tensor("label_names", "BYTES", "9" * 4_000_000), ONE[1]), "label 9{78,79}… is out of range"),
    ((*ONE, tensor("sampler", "BYTES", LONG)), "sampler 'x{78,79}…: choose one of"),
    ((ONE[0], ONE[1], tensor("steps", "INT64", 2**62)), "steps 4611686018427387904 is out"),
    ((tensor("labels", "INT64", *[1] * 9), tensor("seeds", "INT64", *[1] * 9)), "must be <= 8"),
    ((tensor("labels", "INT64", *[1] * 100_000), ONE[1]), "batch size does not match"),
)


def test_large_requests_are_refused(served: Served) -> None:
    for inputs, message in LARGE:
        status, text = ask(served.running.http, "/v2/models/dit/infer", body(*inputs))
        assert status == 400 and len(text) < 1000
        assert re.search(message, json.loads(text)["error"])


def test_latents_of_another_size_are_refused(served: Served) -> None:
    """1 MB of them would take 1.5 GB to decode."""
    latent = tensor("z", "FP32", *[0] * (4 * 256 * 256), shape=(1, 4, 256, 256))
    status, text = ask(served.running.http, "/v2/models/vae_decoder/infer", body(latent))
    assert status == 400 and "unexpected shape" in text


@linux
def test_the_server_runs_in_a_directory_of_its_own(served: Served) -> None:
    """Its Python looks for modules there first. Other users cannot read its shared memory."""
    (pid,) = children(served.running.process.pid)
    folder = Path(f"/proc/{pid}/cwd").resolve()
    assert folder != Path.cwd() and not any(folder.iterdir())
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    regions = list(REGIONS.glob(f"{prefix_of(served.running)}*"))
    assert len(regions) >= 4
    assert {stat.S_IMODE(region.stat().st_mode) for region in regions} == {0o600}


def command_line(running: Running) -> list[str]:
    return Path(f"/proc/{running.process.pid}/cmdline").read_text().split("\0")


def prefix_of(running: Running) -> str:
    (option,) = (arg for arg in command_line(running) if "shm-region-prefix-name=" in arg)
    prefix = option.rpartition("=")[2]
    assert re.fullmatch("dit-[0-9a-f]{16}-", prefix)
    return prefix


def children(pid: int) -> list[int]:
    return [int(i) for i in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def tiny_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    return write_repository(write_bundle(folder / "onnx"), folder / "repository")


def ready(repository: Path, folder: Path, *address: str, stubborn: bool = False) -> Any:
    """A stand-in that serves the repository."""
    server = find_server(ready_server(folder / "opt", stubborn=stubborn))
    return running_server(repository, server, *address, log=folder / "log", ready_seconds=30)


@linux
@pytest.mark.parametrize("killed", ["nobody", "the server", "the supervisor"])
def test_no_shared_memory_is_left_behind(
    tiny_repository: Path, tmp_path: Path, killed: str
) -> None:
    with ready(tiny_repository, tmp_path) as running:
        (region,) = REGIONS.glob(f"{prefix_of(running)}*")
        assert stat.S_IMODE(region.stat().st_mode) == 0o600
        if killed != "nobody":
            pid = running.process.pid
            os.kill(children(pid)[0] if killed == "the server" else pid, 9)
            running.process.wait(30)
            assert region.exists() == (killed == "the supervisor")
    assert not region.exists()


@linux
def test_no_shared_memory_is_left_if_the_starter_is_killed(
    tiny_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor's standard input then ends, and it has to kill a stubborn server."""
    source = Path(supervisor.__file__).read_text()
    assert "ASK_SECONDS = 20.0" in source
    copy = tmp_path / "supervisor.py"
    copy.write_text(source.replace("ASK_SECONDS = 20.0", "ASK_SECONDS = 0.2"))
    monkeypatch.setattr(supervisor, "__file__", str(copy))
    with ready(tiny_repository, tmp_path, stubborn=True) as running:
        (region,) = REGIONS.glob(f"{prefix_of(running)}*")
        assert running.process.stdin is not None
        running.process.stdin.close()  # as the system does for a process that was killed
        assert running.process.wait(30) == -9
        deadline = time.monotonic() + 10
        while region.exists():
            assert time.monotonic() < deadline


def test_a_warning_where_others_reach_it(tiny_repository: Path, tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match=r"^whoever reaches 0\.0\.0\.0 can .*Triton 25\.07") as seen,
        ready(tiny_repository, tmp_path, "0.0.0.0") as running,
    ):
        (names,) = (arg for arg in command_line(running) if arg.startswith(f"{origin.NAMES}="))
    assert len(seen) == 1 and os.uname().nodename in names.partition("=")[2].split(",")
