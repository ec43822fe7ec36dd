"""What web pages and other accounts on the machine can do with the server of `--serve`."""

from __future__ import annotations

import http.client
import json
import os
import re
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bundles import write_bundle
from fake_server import ready_server
from serving import Served, wait_until

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
    "POST /v2/cudasharedmemory/region/x/register", "POST /v2/repository/index",
    "POST /v2/repository/models/dit/load", "POST /v2/logging", "POST /v2/models/dit/trace/setting",
)  # fmt: skip


def test_unused_http_endpoints_are_closed(served: Served) -> None:
    """Any user of the machine can read the key among the server's arguments, but not send it."""
    content = b'{"log_file": "/tmp/x", "key": "/x", "offset": 0, "byte_size": 8}'
    arguments = command_line(served.running)
    options = [arg for arg in arguments if re.match("--(http|grpc)-restrict", arg)]
    assert len(set(options)) == len(options) == 2
    keys = [option.rpartition(":")[2].partition("=") for option in options]
    forged = [{name: value, "for": f"{name}: {value}"} for name, _, value in keys]
    for method, path in map(str.split, CLOSED):
        for headers in ({}, {"Host": "localhost", "nobody": ""}, *forged):
            status, text = ask(served.running.http, path, content, method, **headers)
            assert status == 403 and "restricted" in text, (path, status, text)


def test_unused_grpc_endpoints_are_closed(served: Served) -> None:
    module = pytest.importorskip("tritonclient.grpc")
    with module.InferenceServerClient(served.running.grpc) as client:
        for question in (
            lambda: client.register_system_shared_memory("x", "/x", 8),
            lambda: client.get_cuda_shared_memory_status(),
            lambda: client.load_model("dit"),
            lambda: client.update_log_settings({"log_file": "/tmp/x"}),
            lambda: client.get_trace_settings(),
        ):
            with pytest.raises(module.InferenceServerException, match="protocol is restricted"):
                question()


@pytest.mark.parametrize("model", ["dit", "vae_decoder"])
def test_requests_of_web_pages_are_refused(served: Served, model: str) -> None:
    """A page can send plain text anywhere; if its own name points here, it can read the answer."""
    address, path = served.running.http, f"/v2/models/{model}/infer"
    inputs = ONE if model == "dit" else (LATENT,)
    port = address.rpartition(":")[2]
    for headers in (
        {"Origin": "null"},
        {"Origin": "http://localhost:3000"},
        {"origin": "http://6.6.6.6", "Content_Type": "text/plain"},
        {"Host": f"page.example:{port}", "Origin": f"http://page.example:{port}"},
        {"Host": "127.0.0.1.page.example"},
    ):
        for parameters in ({}, {"host": "localhost", "origin": f"http://{address}"}):
            status, text = ask(address, path, body(*inputs, **parameters), **headers)
            assert status == 400 and re.search("Origin|Host", text), (headers, status, text)
    same = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
    for headers in ({"Host": f"[::1]:{port}"}, same):
        assert ask(address, path, body(*inputs), **headers)[0] == 200


def test_generate_is_closed(served: Served) -> None:
    """Of /generate no headers are forwarded, and its keys must not pass for some."""
    names = ("x", "host", "Host", "HOST", "hOst", "user-agent", "User-Agent")
    asked = {"labels": 1, "seeds": 1, "steps": 1}
    forged = [{name: "localhost"} for name in names]
    forged += [{"parameters": each} for each in forged] + [dict.fromkeys(names, "localhost")]
    for more in (*forged, {"host\0": "localhost"}, {"host": "localhost", "host\0": "localhost"}):
        for kind in ("generate", "generate_stream"):
            content, path = json.dumps(asked | more).encode(), f"/v2/models/dit/{kind}"
            status, text = ask(served.running.http, path, content, Host="page.example")
            assert "images" not in text and (status != 200 or "error" in text), (more, text)


# What Triton forwards to a model → why it is refused. Clients write names in any case.
SAID: tuple[tuple[str, str | None], ...] = (
    ("{}", None), ('{"HOST": "a.localhost."}', None), ('{"host": "[fe80::1]:8000"}', None),
    ('{"host": "192.168.1.7:8000"}', None), ('{"host": "Box.Example:8000"}', None),
    ('{"host": "localhost", "ORIGIN": "https://localhost"}', None),
    ('{"host": "box.example.org"}', "Host"), ('{"host": "1.2.3.4.example:80"}', "Host"),
    ('{"host": ""}', "Host"), ('{"host": 5}', "Host"),
    ('{"host": "localhost\\u001b[2J"}', r"Host 'localhost\\x1b"),
    ('{"origin": "http://localhost"}', "Origin"),
    ('{"host": "localhost", "origin": "http://localhost:1"}', "Origin"),
    ('{"host": "localhost", "origin": true}', "Origin"),
    # A client's parameter does not replace a header.
    ('{"host": "page.example", "host": "localhost"}', "Host"),
    ('{"host": "localhost", "host": "page.example"}', "Host"),
    ('{"host": "6.6.6.6", "origin": "http://6.6.6.6", "host": "localhost"}', "Origin"),
)  # fmt: skip


def test_hosts_and_origins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(origin.NAMES, "box,box.example,")

    def asked(said: str, named: bool = False) -> str | None:
        return refusal(SimpleNamespace(parameters=lambda: said), named)

    for said, reason in SAID:
        found = asked(said)
        assert found is None if reason is None else re.match(reason, found or ""), said
    assert asked("{}", named=True) is None
    monkeypatch.setenv(origin.FORWARDS, "1")  # requests between models still have no headers
    assert asked("{}", named=True) and not asked("{}") and not asked('{"user-agent": ""}', True)


LONG = "x" * 4_000_000
LARGE: tuple[tuple[tuple[dict[str, Any], ...], str], ...] = (
    ((tensor("label_names", "BYTES", LONG), ONE[1]), "label 'x{78,79}… is unknown"),
    ((*ONE, tensor("sampler", "BYTES", LONG)), "sampler 'x{78,79}…: choose one of"),
    ((ONE[0], ONE[1], tensor("steps", "INT64", 2**62)), "steps 4611686018427387904 is out"),
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
    folder = Path(f"/proc/{child(served.running)}/cwd").resolve()
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


def child(running: Running) -> int:
    pid = running.process.pid
    (only,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(only)


@pytest.fixture(scope="module")
def tiny_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    return write_repository(write_bundle(folder / "onnx"), folder / "repository")


@linux
@pytest.mark.parametrize("killed", ["nobody", "the server", "the supervisor", "the starter"])
def test_no_shared_memory_is_left_behind(
    tiny_repository: Path, tmp_path: Path, killed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the starter is killed, the supervisor has to kill a server that is stubborn."""
    source = Path(supervisor.__file__).read_text()
    assert "ASK_SECONDS = 20.0" in source
    (tmp_path / "supervisor.py").write_text(source.replace("SECONDS = 20.0", "SECONDS = 0.2"))
    monkeypatch.setattr(supervisor, "__file__", str(tmp_path / "supervisor.py"))
    server = find_server(ready_server(tmp_path / "opt", stubborn=killed == "the starter"))
    with running_server(tiny_repository, server) as running:
        process = running.process
        (region,) = REGIONS.glob(f"{prefix_of(running)}*")
        assert stat.S_IMODE(region.stat().st_mode) == 0o600
        if killed == "the starter":
            assert process.stdin is not None
            process.stdin.close()  # as the system does for a process that was killed
            assert process.wait(30) == -9
            wait_until(lambda: not region.exists())
        elif killed != "nobody":
            os.kill(child(running) if killed == "the server" else process.pid, 9)
            process.wait(30)
            assert region.exists() == (killed == "the supervisor")
    assert not region.exists()


def test_a_warning_where_others_reach_it(tiny_repository: Path, tmp_path: Path) -> None:
    server = find_server(ready_server(tmp_path / "opt"))
    with (
        pytest.warns(UserWarning, match=r"^whoever reaches 0\.0\.0\.0 can .*Triton 25\.07"),
        running_server(tiny_repository, server, "0.0.0.0") as running,
    ):
        (names,) = (arg for arg in command_line(running) if arg.startswith(f"{origin.NAMES}="))
    assert os.uname().nodename in names.partition("=")[2].split(",")
