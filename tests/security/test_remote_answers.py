"""A server's answers are compared with the request; unexpected ones are an error of one line."""

from __future__ import annotations

import http.server
import json
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_dit

from dit_engine.errors import BackendUnavailable
from dit_export.backends import server as backend_module
from dit_export.backends.server import STEP, TRANSFORMER, TritonBackend
from dit_export.source import weights_hash

pytest.importorskip("tritonclient.http")

MODEL = tiny_dit()
HASH = weights_hash(MODEL)
Answer = tuple[int, dict[str, str], bytes]


def config(**changes: Any) -> dict[str, Any]:
    said = {"checkpoint": HASH, "dtype": "fp32", "guided_channels": "3",
            "model": json.dumps(MODEL.config.to_dict())}  # fmt: skip
    parameters = {name: {"string_value": value} for name, value in said.items()}
    return {"max_batch_size": 4, "parameters": parameters} | changes


def parameter(name: str, value: Any) -> dict[str, Any]:
    return config(parameters=config()["parameters"] | {name: {"string_value": value}})


def tensors(**arrays: np.ndarray) -> Answer:
    """As the server's own: JSON, and the numbers in binary after it."""
    kinds = {"float32": "FP32", "float64": "FP64", "int64": "INT64"}
    outputs = [
        {"name": name, "datatype": kinds[a.dtype.name], "shape": list(a.shape),
         "parameters": {"binary_data_size": a.nbytes}} for name, a in arrays.items()
    ]  # fmt: skip
    head = json.dumps({"model_name": "m", "model_version": "1", "outputs": outputs}).encode()
    body = head + b"".join(a.tobytes() for a in arrays.values())
    return 200, {"Inference-Header-Content-Length": str(len(head))}, body


def text(value: Any) -> Answer:
    return 200, {}, value if isinstance(value, bytes) else json.dumps(value).encode()


def output(**changes: Any) -> Answer:
    values = {"name": "output", "datatype": "FP32", "shape": [2, 8, 8, 8], "data": [0.5] * 1024}
    return text({"outputs": [values | changes]})


class Server:
    """Speaks as much of the v2 protocol as the backend uses; one of its answers is hostile.

    answers: by the last part of a path, such as "infer", or "dit_guided_step/config".
    """

    def __init__(self) -> None:
        self.answers: dict[str, Answer | Callable[[], Iterator[bytes]]] = {}
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 2**16  # a header and its body in one packet

            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                kind = self.path.rpartition("/")[2]
                known = (server.answers[end] for end in server.answers if self.path.endswith(end))
                answer = next(known, text(config() if kind == "config" else {}))
                if callable(answer):
                    self.send_response(200)
                    self.end_headers()
                    self.close_connection = True
                    try:
                        for block in answer():
                            self.wfile.write(block)
                    except OSError:  # the client has had enough
                        pass
                    return
                code, headers, body = answer
                self.send_response(code)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = "Content-Length" in headers

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # clients leave as they like
        self.address = f"127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def backend(self) -> TritonBackend:
        return TritonBackend(MODEL, "fp32", torch.device("cpu"), self.address)


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(backend_module, "weights_hash", lambda _: HASH)
    running.answers.clear()
    return running


X = torch.zeros(2, 4, 8, 8)


def ask(server: Server) -> torch.Tensor:
    return server.backend().prepare(torch.tensor([1, 2]), torch.tensor([9, 4]))(X, 0)


def refused(
    server: Server, said: str | None = None, question: Callable[[Server], Any] = ask
) -> None:
    with pytest.raises(BackendUnavailable, match=said) as error:
        question(server)
    message = str(error.value)
    assert server.address in message and "\n" not in message and len(message) < 2500


def test_the_stand_in_is_taken_for_a_server(server: Server) -> None:
    expected = np.arange(2 * 8 * 64, dtype=np.float32).reshape(2, 8, 8, 8)
    for answer in (tensors(output=expected), output(data=expected.ravel().tolist())):
        server.answers["infer"] = answer
        assert ask(server).tolist() == expected.tolist()


CONFIGURATIONS: list[tuple[Any, str | None]] = [
    (b"<html>", "cannot be read"), (b"[" * 200_000, "cannot be read"), (None, "not an object"),
    ({}, "has no 'max_batch_size'"), (config(max_batch_size=0), "takes no batches"),
    (config(parameters={"model": []}), "is list"), (parameter("checkpoint", 7), "is int, not text"),
    (parameter("checkpoint", "x"), "is of another model, x…"),
    (parameter("model", "{}"), "these weights with another config"),
    (parameter("model", "[" * 99_999), "nested"), (parameter("model", "\ud800"), None),
    (parameter("dtype", "a\n\x1b[31mb"), "ask for that precision, not for 'fp32'"),
    (parameter("guided_channels", "-1"), "guided_channels '-1' of 4"),
    (parameter("guided_channels", "9" * 5000), "guided_channels"),
]  # fmt: skip


def test_configurations(server: Server) -> None:
    for model in (TRANSFORMER, STEP):
        for changed, said in CONFIGURATIONS:
            server.answers = {f"{model}/config": text(changed)}
            refused(server, said)


ANSWERS: list[tuple[Answer, str | None]] = [
    (output(shape=[1, 8, 8, 8], data=[0.0] * 512), r"\(1, 8, 8, 8\); .* \(2, 8, 8, 8\)"),
    (output(shape="2888"), "cannot be read"), (output(datatype="FP64"), "as float64"),
    (output(name=None), "gave no output"), (output(data=[[1], [2, 3]]), "cannot be read"),
    (text({"outputs": [None]}), "cannot be read"), (text(b"[" * 200_000), "cannot be read"),
    (text(b"\xff\xfe"), "UTF-8"), (text(b""), "cannot be read"),
    (tensors(z_next=np.zeros((2, 8, 8, 8), np.float32)), "gave no output"),
    ((*tensors(output=np.zeros((2, 8, 8, 8), np.float32))[:2], b"{}"), "cannot be read"),
    ((200, {"Inference-Header-Content-Length": "x"}, b"{}"), "cannot be read"),
    ((200, {"Content-Length": "99999"}, b"{}"), None),
    ((302, {"Location": "http://127.0.0.1:1/"}, b""), None),
    ((500, {}, b'{"error": "two\\nlines \\u001b[31m"}'), r"two lines \\x1b\[31m"),
    ((500, {}, b"x" * 3_000_000), "x"), ((503, {}, b'{"error": {"a": []}}'), None),
    ((200, {"Content-Encoding": "deflate"}, zlib.compress(b" " * 10**7)), "is compressed"),
]  # fmt: skip


def test_answers(server: Server) -> None:
    for answer, said in ANSWERS:
        server.answers["infer"] = answer
        refused(server, said)
    server.answers = {"ready": (400, {}, b"<html>" * 10**6)}
    refused(server, f"model '{TRANSFORMER}' is not loaded there")


def test_a_step_of_other_shapes(server: Server) -> None:
    def step(server: Server) -> Any:
        conditions = torch.tensor([1, 2, 10, 10]), torch.tensor([9, 4])
        scales = torch.full((2,), 4.0)
        fused = server.backend().fuse(*conditions, np.zeros((2, 9)), scales, 3)
        return fused.guided_step(X, X, X, 0, True)

    good, bad = (np.zeros((2, c, 8, 8), np.float32) for c in (4, 8))
    server.answers["infer"] = tensors(z_next=good, x0=good)
    assert [part.shape for part in step(server)] == [X.shape] * 2
    server.answers["infer"] = tensors(z_next=good, x0=bad)
    refused(server, rf"{STEP} gave x0 as float32 \(2, 8, 8, 8\); float32 \(2, 4, 8, 8\)", step)


@pytest.mark.parametrize("kind", ["config", "infer"])
def test_an_answer_without_an_end(server: Server, kind: str) -> None:
    """It is read up to the limit for an answer to this request."""
    sent = []

    def endless() -> Iterator[bytes]:
        while len(sent) < 2000:
            sent.append(1)
            yield b" " * 2**16

    server.answers[kind] = endless
    refused(server, "more than 16 MiB")
    assert len(sent) < 1000


@pytest.mark.parametrize("kind", ["config", "infer"])
def test_an_answer_that_drips(server: Server, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte comes within the time that is allowed between two of them."""
    monkeypatch.setattr(backend_module, "TOTAL_SECONDS", 0.3)

    def drips() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 2**16  # the stand-in gathers so many before it sends them
            time.sleep(0.05)

    server.answers[kind] = drips
    refused(server, r"took more than 0\.3 seconds")
    del server.answers[kind]
    server.answers["infer"] = output()
    assert ask(server).shape == (2, 8, 8, 8)
