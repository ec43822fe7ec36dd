"""The model repository on a real Triton Inference Server: what it answers, and what it refuses.

Images may differ from the engine's by one level: both compute in float32, but sum in another order,
and truncation to uint8 turns a difference of 1e-5 into a whole level wherever a value lies just at
a level's edge. Such pixels must be few.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving import (
    MAX_BATCH_SIZE,
    Served,
    executions,
    infer,
    names,
    numbers,
    scales,
    settled,
    tensors,
    wait_until,
)

MODELS = ("dit", "dit_guided_step", "dit_transformer", "vae_decoder")
PROTOCOLS = ("http", "grpc")
GOOD = {"labels": numbers(1), "seeds": numbers(1), "steps": numbers(2)}


def assert_same_images(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == np.uint8 and actual.shape == expected.shape
    difference = np.abs(actual.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def engine_images(served: Served, label: int | str, seed: int, **settings: Any) -> np.ndarray:
    made = served.engine.generate(label, seed=seed, backend="eager", output="np", **settings)
    return made.images  # (1, H, W, 3)


def test_images_are_the_engines(served: Served) -> None:
    """One request of four rows, each with its own sampler, number of steps and guidance."""
    rows = [
        ("ant", 7, "ddpm", 8, 4.0),
        ("bee", 2**40 + 3, "ddim", 5, 2.5),
        ("cat", 0, "dpm++", 6, 1.5),
        ("dog", 99, "ddpm", 3, 1.0),
    ]
    label, seed, sampler, steps, scale = zip(*rows, strict=True)
    inputs = {
        "label_names": names(*label), "seeds": numbers(*seed), "sampler": names(*sampler),
        "steps": numbers(*steps), "guidance_scale": scales(*scale),
    }  # fmt: skip
    expected = [
        engine_images(served, label, seed, sampler=sampler, steps=steps, guidance_scale=scale)
        for label, seed, sampler, steps, scale in rows
    ]
    assert_same_images(infer(served.running.grpc, inputs, "grpc"), np.concatenate(expected))
    with urllib.request.urlopen(f"http://{served.running.metrics}/metrics") as answer:
        assert 'nv_inference_request_success{model="dit",version="1"}' in answer.read().decode()


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


# Code, model, inputs, and the message. All others of the model "dit" are in
# test_served_requests.py, and what the server itself refuses in tests/security/test_server.py.
REFUSED: tuple[tuple[int, str, dict[str, np.ndarray], str], ...] = (
    (400, "dit", {"label_names": names("x"), "seeds": numbers(1)}, "label 'x' is unknown; allowed"),
    (400, "dit", dict.fromkeys(GOOD, numbers(*range(MAX_BATCH_SIZE + 1))),
     f"batch-size must be <= {MAX_BATCH_SIZE}"),
    (500, "dit", GOOD | {"guidance_scale": scales(3e38)},
     "latents of image 0 of 1 are not finite with guidance_scale 3e"),
    (400, "dit_transformer", {"x": np.zeros((1, 4, 8, 8), np.float32), "t": numbers(0),
                              "y": numbers(10**6)}, "indices element out of data bounds"),
)  # fmt: skip
STATUS = {
    400: {"http": "400", "grpc": "StatusCode.INVALID_ARGUMENT"},
    500: {"http": "500", "grpc": "StatusCode.INTERNAL"},
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bad_requests_get_an_error(served: Served, protocol: str) -> None:
    refused = import_module("tritonclient.utils").InferenceServerException
    for code, model, inputs, message in REFUSED:
        with pytest.raises(refused) as error:
            infer(getattr(served.running, protocol), inputs, protocol, model)
        said = error.value.message()
        assert re.search(message, said) and "\n" not in said.strip(), said
        assert error.value.status() == STATUS[code][protocol], said


def test_cancelled_request_ends_its_loop(served: Served) -> None:
    module: Any = import_module("tritonclient.grpc")
    answers: list[object] = []
    inputs = tensors(GOOD | {"steps": numbers(1000)}, "grpc")

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


def test_the_repositorys_client(served: Served, tmp_path: Path) -> None:
    """As a user runs it: a file of its own, without our packages on its path."""
    output, client = tmp_path / "images.png", served.repository / "client.py"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(client), *arguments]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=100
        )

    done = run(served.running.http, str(output), "4", "ant", "3")
    assert done.returncode == 0, done.stderr
    expected = [engine_images(served, label, i, steps=4)[0] for i, label in enumerate(("ant", 3))]
    assert_same_images(np.asarray(Image.open(output)), np.concatenate(expected, axis=1))
    for arguments, message in (
        ((served.running.http, "a.png", "4", "nothing"), "label 'nothing' is unknown; allowed are"),
        ((), "four or more arguments are needed"),
        ((served.running.http, "a.png", "-1", "ant"), "steps '-1' is not a whole number"),
        (("127.0.0.1:1", "a.png", "50", "a"), "no server answers at 127.0.0.1:1: .*refused"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert re.search(message, done.stderr), done.stderr
