"""The model repository on a real Triton Inference Server: what it answers, and what it refuses.

Images may differ from the engine's by one level: both compute in float32, but sum in another order,
and truncation to uint8 turns a difference of 1e-5 into a whole level wherever a value lies just at
a level's edge. Such pixels must be few.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving import MAX_BATCH_SIZE, Served, executions, infer, names, numbers, scales, settled

MODELS = ("dit", "dit_guided_step", "dit_transformer", "vae_decoder")
PROTOCOLS = ("http", "grpc")


def assert_same_images(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == np.uint8 and actual.shape == expected.shape
    difference = np.abs(actual.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def engine_images(served: Served, label: int | str, seed: int, **settings: Any) -> np.ndarray:
    made = served.engine.generate(label, seed=seed, backend="eager", output="np", **settings)
    return made.images  # (1, H, W, 3)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_images_are_the_engines(served: Served, protocol: str) -> None:
    """One request of four rows, each with its own sampler, number of steps and guidance."""
    module = import_module(f"tritonclient.{protocol}")
    address = getattr(served.running, protocol)
    with module.InferenceServerClient(address) as client:
        assert [model for model in MODELS if not client.is_model_ready(model)] == []
    rows = [
        ("ant", 7, "ddpm", 8, 4.0),
        ("bee", 2**40 + 3, "ddim", 5, 2.5),
        ("cat", 0, "dpm++", 6, 1.5),
        ("dog", 99, "ddpm", 3, 1.0),
    ]
    label, seed, sampler, steps, scale = zip(*rows, strict=True)
    inputs = {
        "label_names": names(*label),
        "seeds": numbers(*seed),
        "sampler": names(*sampler),
        "steps": numbers(*steps),
        "guidance_scale": scales(*scale),
    }
    expected = [
        engine_images(served, label, seed, sampler=sampler, steps=steps, guidance_scale=scale)
        for label, seed, sampler, steps, scale in rows
    ]
    assert_same_images(infer(address, inputs, protocol), np.concatenate(expected))
    with urllib.request.urlopen(f"http://{served.running.metrics}/metrics") as answer:
        assert 'nv_inference_request_success{model="dit",version="1"}' in answer.read().decode()


def test_numbers_and_defaults(served: Served) -> None:
    """ddim's usual count of steps is 50, and 4.0 the guidance scale, as in `Engine.generate`."""
    inputs = {"labels": numbers(3), "seeds": numbers(5), "sampler": names("ddim")}
    expected = engine_images(served, 3, 5, sampler="ddim", steps=50, guidance_scale=4.0)
    assert_same_images(infer(served.running.http, inputs), expected)


def test_concurrent_clients_share_batches(served: Served) -> None:
    """Their numbers of steps differ, so they are at different time steps in one batch."""
    n, steps = 8, (4, 6)
    before = settled(served.running.http, *MODELS)

    def ask(i: int) -> np.ndarray:
        protocol = PROTOCOLS[i % 2]
        inputs = {"labels": numbers(i), "seeds": numbers(50 + i), "steps": numbers(steps[i % 2])}
        return infer(getattr(served.running, protocol), inputs, protocol)

    with ThreadPoolExecutor(n) as pool:
        images = list(pool.map(ask, range(n)))
    for i, image in enumerate(images):
        assert_same_images(image, engine_images(served, i, 50 + i, steps=steps[i % 2]))
    after = settled(served.running.http, *MODELS)
    counts = {m: tuple(a - b for a, b in zip(after[m], before[m], strict=True)) for m in MODELS}
    rows = {model: rows for model, (rows, _) in counts.items()}
    wanted = n * sum(steps) // 2
    assert rows == {"dit": n, "dit_guided_step": wanted, "dit_transformer": 0, "vae_decoder": n}
    assert counts["dit"][1] < n and counts["dit_guided_step"][1] < wanted


GOOD = {"labels": numbers(1), "seeds": numbers(1), "steps": numbers(2)}
X = np.zeros((1, 4, 8, 8), dtype=np.float32)
T = {"t": numbers(0), "y": numbers(0)}
TOO_MANY = numbers(*range(MAX_BATCH_SIZE + 1))

# Model, changes to a good request, and the message: of the server itself, and some of ours
# (test_loop.py has the others). All are the client's mistakes except two.
REFUSED: dict[str, tuple[str, dict[str, np.ndarray | None], str]] = {
    "unknown label": ("dit", {"labels": None, "label_names": names("nothing")},
                      "label 'nothing' is unknown; allowed are"),
    "no seed": ("dit", {"seeds": None}, "seeds is missing"),
    "overflow": ("dit", {"guidance_scale": scales(3e38)},
                 "latents of image 0 of 1 are not finite, first at step . of 2 with guidance"),
    "no image": ("dit", {name: numbers() for name in GOOD}, "input byte size mismatch"),
    "labels by twos": ("dit", {"labels": np.zeros((1, 2), np.int64)}, "shape|expected"),
    "labels without rows": ("dit", {"labels": np.zeros(1, np.int64)}, "shape|dimension|batch"),
    "labels that are truth values": ("dit", {"labels": np.ones((1, 1), bool)}, "data-type"),
    "unknown input": ("dit", {"latents": scales(0.0)}, "latents"),
    "huge batch": ("dit", {"labels": TOO_MANY, "seeds": TOO_MANY, "steps": TOO_MANY},
                   f"batch-size must be <= {MAX_BATCH_SIZE}"),
    "shapes that differ": ("dit", {"seeds": numbers(1, 2)}, "batch size|batch-size"),
    "wrong shape": ("dit_transformer", {"x": X[:, :, :4], **T}, "unexpected shape for input 'x'"),
    "latents of another size": ("vae_decoder", {"z": np.zeros((1, 4, 512, 512), np.float32)},
                                "unexpected shape for input 'z'"),
    "label of no class": ("dit_transformer", {"x": X, "t": numbers(0), "y": numbers(10**6)},
                          "indices element out of data bounds|out of bounds"),
    "unknown model": ("dit_xl", {"x": X}, "unknown model"),
}  # fmt: skip
STATUS = {
    400: {"http": "400", "grpc": "StatusCode.INVALID_ARGUMENT"},
    404: {"http": "404", "grpc": "StatusCode.NOT_FOUND"},
    500: {"http": "500", "grpc": "StatusCode.INTERNAL"},
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("case", REFUSED)
def test_bad_requests_get_an_error(served: Served, case: str, protocol: str) -> None:
    model, changes, message = REFUSED[case]
    code = {"overflow": 500, "unknown model": 404}.get(case, 400)
    base = GOOD if model == "dit" else {}
    inputs = {name: value for name, value in (base | changes).items() if value is not None}
    refused = import_module("tritonclient.utils").InferenceServerException
    with pytest.raises(refused) as error:
        infer(getattr(served.running, protocol), inputs, protocol, model)
    said = error.value.message()
    assert re.search(message, said) and "\n" not in said.strip(), said
    assert error.value.status() == STATUS[code][protocol]
    assert served.running.process.poll() is None


def test_bad_requests_leave_those_beside_them_alone(served: Served) -> None:
    """Sent at once, so that they meet in dynamic batches; afterwards all is well."""
    refused = import_module("tritonclient.utils").InferenceServerException
    asked = [GOOD, GOOD | {"labels": numbers(-1)}, GOOD, GOOD | {"guidance_scale": scales(3e38)}]
    asked += [GOOD, GOOD | {"steps": numbers(0)}]

    def ask(inputs: dict[str, np.ndarray]) -> np.ndarray | None:
        try:
            return infer(served.running.http, inputs)
        except refused:
            return None

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(ask, asked))
    expected = engine_images(served, 1, 1, steps=2)
    for inputs, images in zip(asked, answers, strict=True):
        if inputs is GOOD:
            assert images is not None
            assert_same_images(images, expected)
        else:
            assert images is None
    assert_same_images(infer(served.running.grpc, GOOD, "grpc"), expected)


def test_cancelled_request_ends_its_loop(served: Served) -> None:
    module: Any = import_module("tritonclient.grpc")
    answers: list[object] = []
    inputs = []
    for name, value in {"labels": numbers(1), "seeds": numbers(1), "steps": numbers(1000)}.items():
        inputs.append(module.InferInput(name, [1, 1], "INT64"))
        inputs[-1].set_data_from_numpy(value)

    def steps() -> int:
        return executions(served.running.http, "dit_guided_step")[0]

    before = steps()
    with module.InferenceServerClient(served.running.grpc) as client:
        running = client.async_infer("dit", inputs, lambda result, error: answers.append(error))
        wait_until(lambda: steps() > before)
        running.cancel()
        wait_until(lambda: len(answers) == 1)
    taken = settled(served.running.http, "dit_guided_step")["dit_guided_step"][0] - before
    assert 0 < taken < 1000


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def run_client(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As a user runs it: a file of its own, without our packages on its path."""
    command = [sys.executable, str(repository / "client.py"), *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=repository.parent, env=environment, capture_output=True, text=True, check=False
    )


def assert_one_line(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert re.search(message, done.stderr), done.stderr


def test_the_repositorys_client(served: Served, tmp_path: Path) -> None:
    output, client = tmp_path / "images.png", served.repository / "client.py"
    done = run_client(served.repository, served.running.http, str(output), "4", "ant", "3")
    assert done.returncode == 0, done.stderr
    expected = [engine_images(served, label, i, steps=4)[0] for i, label in enumerate(("ant", 3))]
    assert_same_images(np.asarray(Image.open(output)), np.concatenate(expected, axis=1))
    refused = run_client(served.repository, served.running.http, str(output), "4", "nothing")
    assert_one_line(refused, "label 'nothing' is unknown; allowed are")
    assert sum(line != "" for line in client.read_text().splitlines()) <= 27


def test_the_repositorys_client_with_bad_input(repository: Path) -> None:
    """Where nobody listens, a port is held all the same."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{unused.getsockname()[1]}"
        for arguments, message in (
            ([], "four or more arguments are needed. Images of labels, from seeds 0, 1, …: python"),
            ([nobody, "a.png", "50"], "four or more arguments are needed"),
            ([nobody, "a.png", "fifty", "ant"], "steps 'fifty' is not a whole number"),
            ([nobody, "a.png", "-1", "ant"], "steps '-1' is not a whole number"),
            ([f"http://{nobody}", "a.png", "50", "ant"],
             f"answers at http://{nobody}: .*Connection refused .*{nobody} a.png 50 ant"),
            (["no.such.host.invalid:1", "a.png", "50", "a"], "no server answers at no.such.host"),
        ):  # fmt: skip
            assert_one_line(run_client(repository, *arguments), message)
