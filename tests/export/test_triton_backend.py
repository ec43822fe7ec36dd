"""`Engine.generate(backend="triton://…")` against a real server, and without one."""

from __future__ import annotations

import http.server
import json
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from serving import MAX_BATCH_SIZE, Served
from tiny import tiny_dit, tiny_engine
from triton_requests import settled

from dit_engine.engine import Engine
from dit_engine.errors import BackendUnavailable
from dit_export.backends import server as backend_module
from dit_export.backends.server import TritonBackend
from dit_export.server.remote import RemoteServer, is_loopback
from dit_export.source import weights_hash


def latents(engine: Engine, backend: str, n: int = 2, **settings: object) -> torch.Tensor:
    labels = [i % engine.config.num_classes for i in range(n)]
    return engine.generate(labels, seed=3, backend=backend, output="latent", **settings).images


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Float32 on both sides: 1e-4 of the largest latent, after a few steps."""
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < 1e-4, error


CASES = {
    "guided there": {"steps": 5},
    "guided here, all channels": {"steps": 4, "guidance_channels": None, "sampler": "ddim"},
    "unguided": {"steps": 4, "guidance_scale": 1.0, "sampler": "dpm++"},
    "an interval": {"steps": 6, "guidance_interval": (0.1, 10.0)},
    "ddim with noise, a scale an image": {
        "steps": 4, "sampler": "ddim", "eta": 0.5, "guidance_scale": [1.0, 6.0],
    },
    "noise as the reference draws it": {"steps": 3, "noise": "official"},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_latents_are_eagers(served: Served, case: str) -> None:
    settings = {key: value for key, value in CASES[case].items() if key != "noise"}
    if "noise" in CASES[case]:
        settings["noise"] = "official"
    actual = latents(served.engine, f"triton://{served.running.http}", **settings)
    assert_close(actual, latents(served.engine, "eager", **settings))


def test_over_grpc(served: Served) -> None:
    actual = latents(served.engine, f"triton://grpc+{served.running.grpc}", steps=4)
    assert_close(actual, latents(served.engine, "eager", steps=4))


def test_images_and_record(served: Served) -> None:
    backend = f"triton://{served.running.http}"
    made = served.engine.generate(["cat", 2], seed=1, steps=4, backend=backend, output="np")
    eager = served.engine.generate(["cat", 2], seed=1, steps=4, backend="eager", output="np")
    assert abs(made.images.astype(int) - eager.images.astype(int)).max() <= 1
    assert made.settings["backend"] == backend


def test_more_images_than_the_servers_largest_batch(served: Served) -> None:
    n = MAX_BATCH_SIZE + 3
    before = settled(served.running.http, "dit_guided_step")["dit_guided_step"]
    actual = latents(served.engine, f"triton://{served.running.http}", n, steps=2)
    rows, _ = settled(served.running.http, "dit_guided_step")["dit_guided_step"]
    assert rows - before[0] == 2 * n
    assert_close(actual, latents(served.engine, "eager", n, steps=2))


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_threads_share_a_backend(served: Served, protocol: str) -> None:
    address = served.running.http if protocol == "http" else f"grpc+{served.running.grpc}"
    expected = latents(served.engine, "eager", steps=3)
    with ThreadPoolExecutor(4) as pool:
        tasks = [pool.submit(latents, served.engine, f"triton://{address}", steps=3)
                 for _ in range(4)]  # fmt: skip
        for task in tasks:
            assert_close(task.result(), expected)


def test_another_model_or_precision_is_refused(served: Served) -> None:
    backend = f"triton://{served.running.http}"
    with pytest.raises(
        BackendUnavailable,
        match=r"its dit_transformer is of another model: .* \w{12}…",
    ):
        tiny_engine().generate(1, steps=2, backend=backend)
    with pytest.raises(BackendUnavailable, match=r"'fp32': ask for that precision, not for 'fp16'"):
        served.engine.generate(1, steps=2, backend=backend, precision="fp16")
    other = Engine.from_pretrained(
        served.repository.with_name("model"), device="cpu", numerics="diffusers"
    )
    with pytest.raises(BackendUnavailable, match="these weights with another config"):
        other.generate(1, steps=2, backend=backend)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_model_that_is_not_loaded(served: Served, protocol: str) -> None:
    address = served.running.http if protocol == "http" else f"grpc+{served.running.grpc}"
    with pytest.raises(BackendUnavailable, match=r"model 'dit_xl' is not loaded there$"):
        RemoteServer(address).config("dit_xl")


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_arguments_that_the_server_refuses(served: Served, protocol: str) -> None:
    address = served.running.http if protocol == "http" else f"grpc+{served.running.grpc}"
    server, step = RemoteServer(address), np.zeros((1, 1), np.int64)
    x = np.zeros((1, 4, 8, 8), np.float32)
    for inputs, message in (
        ({"x": x, "t": step, "y": step + 10**6}, "indices element out of data bounds"),
        ({"x": x[:, :, :4], "t": step, "y": step}, "unexpected shape for input 'x'"),
        ({"x": np.tile(x, (99, 1, 1, 1)), "t": np.tile(step, (99, 1)),
          "y": np.tile(step, (99, 1))}, f"batch-size must be <= {MAX_BATCH_SIZE}"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message) as error:
            server.infer("dit_transformer", inputs, ["output"])
        assert str(error.value).startswith(f"{address}: ") and "\n" not in str(error.value)
    with pytest.raises(BackendUnavailable, match="dit_xl"):
        server.infer("dit_xl", {"x": x}, ["output"])


@pytest.mark.parametrize("address", ["", "here", ":8000", "here:port", "here:0", "here:70000"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        latents(tiny_engine(), f"triton://{address}", steps=1)


def test_no_address() -> None:
    with pytest.raises(ValueError, match=r"needs an address: triton://host:port$"):
        latents(tiny_engine(), "triton", steps=1)


@pytest.mark.parametrize("protocol", ["", "grpc+"])
def test_nobody_there(protocol: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, but not listened on
        address = f"{protocol}127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(BackendUnavailable) as error:
            latents(tiny_engine(), f"triton://{address}", steps=1)
    message = str(error.value)
    assert address in message and "no Triton Inference Server answers there" in message
    assert "\n" not in message


class _Other(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def listening(reply: bytes | None) -> Iterator[str]:
    """Something that is no Triton: a web server, or a program that says ``reply`` to everyone."""
    if reply is None:
        server: http.server.HTTPServer | socket.socket = http.server.HTTPServer(
            ("127.0.0.1", 0), _Other
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
        return

    def answer(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(4096)
                connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("protocol", ["", "grpc+"])
@pytest.mark.parametrize("reply", [None, b"", b"220 mail ready\r\n"], ids=["web", "mute", "mail"])
def test_something_else_there(protocol: str, reply: bytes | None) -> None:
    with listening(reply) as address, pytest.raises(BackendUnavailable) as error:
        latents(tiny_engine(), f"triton://{protocol}{address}", steps=1)
    assert address in str(error.value) and "\n" not in str(error.value)


class FakeServer:
    """A `RemoteServer` of `tiny_dit`, with the given changes to a model's parameters."""

    def __init__(self, **changes: dict[str, str]) -> None:
        self.address, self.changes = "far:8000", changes
        self.asked: list[str] = []

    def config(self, model: str) -> dict[str, Any]:
        dit = tiny_dit()
        said = {"checkpoint": weights_hash(dit), "dtype": "fp32", "guided_channels": "3",
                "model": json.dumps(dit.config.to_dict())}  # fmt: skip
        said |= self.changes.get(model, {})
        parameters = {name: {"string_value": value} for name, value in said.items()}
        return {"max_batch_size": 4, "parameters": parameters}

    error = RemoteServer.error

    def infer(self, model: str, *_: object) -> list[np.ndarray]:
        self.asked.append(model)
        return []


def backend_of(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> TritonBackend:
    monkeypatch.setattr(backend_module, "RemoteServer", lambda address: server)
    return TritonBackend(tiny_dit(), "fp32", torch.device("cpu"), server.address)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "0" * 64}, r"its dit_guided_step is of another model: its weights are 000"),
        ({"dtype": "fp16"}, r"its dit_guided_step is in 'fp16': ask for that precision"),
        ({"model": "{}"}, r"its dit_guided_step has these weights with another config$"),
    ],
)
def test_the_step_must_be_of_the_same_model(
    changes: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendUnavailable, match=message):
        backend_of(FakeServer(dit_guided_step=changes), monkeypatch)


def test_guided_channels_are_those_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer(dit_guided_step={"guided_channels": "2"})
    assert backend_of(server, monkeypatch).guided_channels == 2


def test_no_rows_are_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer()
    backend = backend_of(server, monkeypatch)
    conditions = torch.tensor([1, 2]), torch.tensor([9, 4])
    denoiser = backend.prepare(*conditions)
    nothing = torch.zeros(0, 4, 8, 8, dtype=torch.float64)
    assert denoiser(nothing, 0).shape == (0, 8, 8, 8)
    assert denoiser(nothing, 0).dtype == torch.float64
    fused = backend.fuse(*conditions, np.zeros((2, 9)), torch.full((0,), 4.0), 3)
    for guide in (True, False):
        z, x0 = fused.guided_step(nothing, nothing, nothing, 0, guide)
        assert z.shape == x0.shape == (0, 4, 8, 8)
    assert server.asked == []


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_without_tritonclient(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"tritonclient.{protocol}", None)  # importing it raises
    address = "localhost:8000" if protocol == "http" else "grpc+localhost:8001"
    with pytest.raises(ImportError) as error:
        latents(tiny_engine(), f"triton://{address}", steps=1)
    message = "tritonclient is not installed: pip install 'dit-engine[triton-client]'"
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("[::1]", True), ("localhost", True),
     ("10.0.0.1", False), ("example.org", False)],
)  # fmt: skip
def test_what_is_this_machine(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_proxy_of_the_environment_is_not_asked_about_this_machine(
    served: Served, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{unused.getsockname()[1]}"
        for name in ("http_proxy", "https_proxy", "grpc_proxy"):
            monkeypatch.setenv(name, proxy)
        for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        address = served.running.http if protocol == "http" else f"grpc+{served.running.grpc}"
        config = RemoteServer(address).config("dit_transformer")
    assert config["name"] == "dit_transformer"
