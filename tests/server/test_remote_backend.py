"""`Engine.generate(backend="triton://…")` against a real server, and without one.

What a broken server answers is in tests/security/test_remote_answers.py.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from serving import MAX_BATCH_SIZE, Served, numbers, settled
from tiny import tiny_engine

from dit_engine.engine import Engine
from dit_engine.errors import BackendUnavailable
from dit_export.backends.server import RemoteServer
from dit_export.server.origin import is_loopback

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
    ],
    ids=str,
)
def test_latents_are_eagers(served: Served, settings: dict[str, Any]) -> None:
    assert_eagers(served, "http", **settings)


def test_more_images_than_the_servers_largest_batch(served: Served) -> None:
    n = MAX_BATCH_SIZE + 3
    before = settled(served.running.http, "dit_guided_step")["dit_guided_step"]
    scales = [1.0 + i for i in range(n)]
    assert_eagers(served, "grpc", n, steps=2, guidance_scale=scales)
    rows, _ = settled(served.running.http, "dit_guided_step")["dit_guided_step"]
    assert rows - before[0] == 2 * n


def test_threads_share_a_backend(served: Served) -> None:
    with ThreadPoolExecutor(4) as pool:
        for task in [pool.submit(assert_eagers, served, "http", steps=3) for _ in range(4)]:
            task.result()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_requests_that_the_server_refuses(served: Served, protocol: str) -> None:
    server = RemoteServer(served.address(protocol))
    x = np.zeros((1, 4, 8, 8), np.float32)
    inputs = {"x": x, "t": numbers(0), "y": numbers(10**6)}
    with pytest.raises(ValueError, match="out of data bounds") as error:
        server.infer("dit_transformer", inputs, ["output"])
    assert str(error.value).startswith(f"{server.address}: ") and "\n" not in str(error.value)
    with pytest.raises(BackendUnavailable, match="dit_xl"):
        server.infer("dit_xl", {"x": x}, ["output"])
    with pytest.raises(BackendUnavailable, match=r"model 'dit_xl' is not loaded there$"):
        server.config("dit_xl")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_proxy_of_the_environment_is_not_asked_about_this_machine(
    served: Served, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    config = RemoteServer(served.address(protocol)).config("dit_transformer")
    assert config["name"] == "dit_transformer"
    assert all(map(is_loopback, ("127.8.0.1", "[::1]", "localhost")))
    assert not is_loopback("10.0.0.1") and not is_loopback("example.org")


def test_nobody_there() -> None:
    for address in ("127.0.0.1:1", "grpc+127.0.0.1:1"):
        with pytest.raises(BackendUnavailable, match=r"127\.0\.0\.1:1: no Triton .* answers there"):
            RemoteServer(address).config("dit")


def test_invalid_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("", "://", "://here", "://:8000", "://here:port", "://here:70000"):
        with pytest.raises(ValueError, match="host:port"):
            latents(tiny_engine(), f"triton{address}", steps=1)
    monkeypatch.setitem(sys.modules, "tritonclient.http", None)  # importing it raises
    with pytest.raises(ImportError, match=r"pip install 'dit-engine\[triton-client\]'$"):
        RemoteServer("localhost:8000")
