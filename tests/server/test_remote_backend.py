"""`Engine.generate(backend="triton://…")` against a real server, and without one."""

from __future__ import annotations

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
from serving import MAX_BATCH_SIZE, Served, numbers, settled
from tiny import tiny_dit, tiny_engine

from dit_engine.engine import Engine
from dit_engine.errors import BackendUnavailable
from dit_export.backends import server as backend_module
from dit_export.backends.server import TritonBackend
from dit_export.server.remote import RemoteServer, is_loopback
from dit_export.source import weights_hash

PROTOCOLS = ("http", "grpc")


def latents(engine: Engine, backend: str, n: int = 2, **settings: Any) -> torch.Tensor:
    labels = [i % engine.config.num_classes for i in range(n)]
    return engine.generate(labels, seed=3, backend=backend, output="latent", **settings).images


def assert_eagers(served: Served, protocol: str, n: int = 2, **settings: Any) -> None:
    """Float32 on both sides: 1e-4 of the largest latent, after a few steps."""
    actual = latents(served.engine, f"triton://{served.address(protocol)}", n, **settings)
    expected = latents(served.engine, "eager", n, **settings)
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < 1e-4, error


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 5},  # guided there
        {"steps": 4, "guidance_channels": None, "sampler": "ddim"},  # guided here, on all channels
        {"steps": 4, "guidance_scale": 1.0, "sampler": "dpm++"},  # unguided
        {"steps": 6, "guidance_interval": (0.1, 10.0)},
        {"steps": 4, "sampler": "ddim", "eta": 0.5, "guidance_scale": [1.0, 6.0]},
        {"steps": 3, "noise": "official"},
    ],
    ids=str,
)
def test_latents_are_eagers(served: Served, settings: dict[str, Any]) -> None:
    assert_eagers(served, "http", **settings)


def test_images_and_record(served: Served) -> None:
    backend = f"triton://{served.running.http}"
    made = served.engine.generate(["bee", 2], seed=1, steps=4, backend=backend, output="np")
    eager = served.engine.generate(["bee", 2], seed=1, steps=4, backend="eager", output="np")
    assert abs(made.images.astype(int) - eager.images.astype(int)).max() <= 1
    assert made.settings["backend"] == backend


def test_more_images_than_the_servers_largest_batch(served: Served) -> None:
    n = MAX_BATCH_SIZE + 3
    before = settled(served.running.http, "dit_guided_step")["dit_guided_step"]
    scales = [1.0 + i for i in range(n)]
    assert_eagers(served, "http", n, steps=2, guidance_scale=scales)
    rows, _ = settled(served.running.http, "dit_guided_step")["dit_guided_step"]
    assert rows - before[0] == 2 * n


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_threads_share_a_backend(served: Served, protocol: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        tasks = [pool.submit(assert_eagers, served, protocol, steps=3) for _ in range(4)]
        for task in tasks:
            task.result()


def test_another_model_or_precision_is_refused(served: Served) -> None:
    model = str(served.repository.with_name("model"))
    wide = Engine.from_pretrained(model, device="cpu", numerics="diffusers")
    for engine, precision, message in (
        (tiny_engine(), "fp32", r"its dit_transformer is of another model: .* \w{12}…"),
        (served.engine, "fp16", "is in 'fp32': ask for that precision, not for 'fp16'"),
        (wide, "fp32", "these weights with another config"),
    ):
        with pytest.raises(BackendUnavailable, match=message):
            latents(engine, f"triton://{served.running.http}", steps=2, precision=precision)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_requests_that_the_server_refuses(served: Served, protocol: str) -> None:
    address = served.address(protocol)
    server, step = RemoteServer(address), numbers(0)
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
    with pytest.raises(BackendUnavailable, match=r"model 'dit_xl' is not loaded there$"):
        server.config("dit_xl")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_proxy_of_the_environment_is_not_asked_about_this_machine(
    served: Served, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        for name in ("http_proxy", "https_proxy", "grpc_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{unused.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        config = RemoteServer(served.address(protocol)).config("dit_transformer")
    assert config["name"] == "dit_transformer"
    loopback = {"127.0.0.1": True, "127.8.0.1": True, "[::1]": True, "localhost": True,
                "10.0.0.1": False, "example.org": False}  # fmt: skip
    assert {host: is_loopback(host) for host in loopback} == loopback


@contextmanager
def listening(reply: bytes) -> Iterator[str]:
    """A program that is not Triton, and says ``reply`` to everyone."""

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


@contextmanager
def nobody() -> Iterator[str]:
    """An address that is taken, but not listened on."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{unused.getsockname()[1]}"


@pytest.mark.parametrize("protocol", ["", "grpc+"])
@pytest.mark.parametrize(
    ("there", "said"),
    [
        (nobody, "no Triton Inference Server answers there"),
        (lambda: listening(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"), None),
        (lambda: listening(b""), None),
        (lambda: listening(b"220 mail ready\r\n"), None),
    ],
    ids=["nobody", "web", "mute", "mail"],
)
def test_something_else_there(protocol: str, there: Any, said: str | None) -> None:
    with there() as address, pytest.raises(BackendUnavailable, match=said) as error:
        latents(tiny_engine(), f"triton://{protocol}{address}", steps=1)
    assert address in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("address", ["", "://", "://here", "://:8000", "://here:port", "://here:0",
                                     "://here:70000"])  # fmt: skip
def test_invalid_addresses(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        latents(tiny_engine(), f"triton{address}", steps=1)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_without_tritonclient(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"tritonclient.{protocol}", None)  # importing it raises
    address = "localhost:8000" if protocol == "http" else "grpc+localhost:8001"
    with pytest.raises(ImportError, match=r"pip install 'dit-engine\[triton-client\]'$"):
        latents(tiny_engine(), f"triton://{address}", steps=1)


class FakeServer:
    """A `RemoteServer` of `tiny_dit`, with changes to the parameters of its guided step."""

    address, error = "far:8000", RemoteServer.error

    def __init__(self, **changes: str) -> None:
        self.changes, self.asked = changes, list[str]()

    def config(self, model: str) -> dict[str, Any]:
        dit = tiny_dit()
        said = {"checkpoint": weights_hash(dit), "dtype": "fp32", "guided_channels": "3",
                "model": json.dumps(dit.config.to_dict())}  # fmt: skip
        said |= self.changes if model == "dit_guided_step" else {}
        parameters = {name: {"string_value": value} for name, value in said.items()}
        return {"max_batch_size": 4, "parameters": parameters}

    def infer(self, model: str, *_: object) -> list[np.ndarray]:
        self.asked.append(model)
        return []


def test_the_step_must_be_of_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(**changes: str) -> Any:
        server = FakeServer(**changes)
        monkeypatch.setattr(backend_module, "RemoteServer", lambda _: server)
        return TritonBackend(tiny_dit(), "fp32", torch.device("cpu"), server.address)

    for changes, message in (
        ({"checkpoint": "0" * 64}, "is of another model: its weights are 000"),
        ({"dtype": "fp16"}, "is in 'fp16': ask for that precision, not for 'fp32'"),
        ({"model": "{}"}, "has these weights with another config$"),
    ):
        with pytest.raises(BackendUnavailable, match=f"^far:8000: its dit_guided_step {message}"):
            backend(**changes)
    made = backend(guided_channels="2")
    assert made.guided_channels == 2
    conditions = torch.tensor([1, 2]), torch.tensor([9, 4])
    nothing = torch.zeros(0, 4, 8, 8, dtype=torch.float64)  # no rows are no request
    output = made.prepare(*conditions)(nothing, 0)
    assert output.shape == (0, 8, 8, 8) and output.dtype == torch.float64
    fused = made.fuse(*conditions, np.zeros((2, 9)), torch.full((0,), 4.0), 3)
    for guide in (True, False):
        z, x0 = fused.guided_step(nothing, nothing, nothing, 0, guide)
        assert z.shape == x0.shape == (0, 4, 8, 8)
    assert made.server.asked == []
